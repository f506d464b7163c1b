"""`check DIR --leave_one_out`: short runs, their table and picture, in `NAME_leave_one_out/`; it can be resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.config.files import load_settings
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import SUBJECT_FILE
from dreambooth_moslora.core.toy import is_toy
from dreambooth_moslora.evaluation.studies.study_subject import StudySubject
from dreambooth_moslora.training.planning.choices import recipe_settings

__all__ = ["USUAL_STEPS", "leave_one_out", "short_run"]

USUAL_STEPS = 60
SHORT = {
    "exposures_per_photo": None,
    "evaluate_steps": None,
    "early_stopping": None,
    "find_scale": False,
    "resume_from_checkpoint": None,
    "push_to_hub": False,
    "checkpoints_total_limit": None,
}
"""Settings of a recipe that a short run does not use."""


def short_run(folder: Path, config_file: str | None, given: dict[str, Any], base: str, steps: int) -> TrainConfig:
    """The settings of a short run of `steps`, from the recipe in the file, or that of the base and the GPU;
    `given` overrides.

    `base` is used if no base is named and the photos are not of toys. Raises UserError when no word says what
    the photos show.
    """
    from dreambooth_moslora.training.planning.estimate import free_gib_of_gpu

    file = load_settings(config_file) if config_file else {}
    usual = "toy" if (folder / SUBJECT_FILE).is_file() else base
    base = (file | given).get("pretrained_model_name_or_path", usual)
    recipe = file or recipe_settings(base, free_gib_of_gpu())[1]
    if "instance_prompt" not in given and not config_file:
        subject = StudySubject.of(str(folder))
        recipe |= {"instance_prompt": subject.instance_prompt, "class_prompt": subject.class_prompt}
    elif not config_file:
        recipe |= {"with_prior_preservation": False, "class_prompt": None}
    chosen = {"pretrained_model_name_or_path": base, "instance_data_dir": str(folder), "subjects": ()}
    config = TrainConfig.from_dict({**recipe, **SHORT, **chosen, **given, "max_train_steps": steps})
    return replace(config, masks="auto") if is_toy(base) and "masks" not in file else config


def leave_one_out(config: TrainConfig, names: list[str], out: Path) -> str:
    """Train, score and compare; returns the table and the verdict. Raises UserError."""
    from dreambooth_moslora.cli.commands.compare import CellProgress
    from dreambooth_moslora.evaluation.leave_one_out import (
        effect_plot,
        effects_of,
        study_without_each,
        table_of,
        verdict,
    )
    from dreambooth_moslora.evaluation.studies.run import run_study

    study = study_without_each(config, names)
    progress = CellProgress()
    results = run_study(study, out, 1, progress)
    if progress.failed and len(results) == 0:
        raise UserError("--leave_one_out: every short run failed; the reasons are above.")
    effects = effects_of(names, results)
    effect_plot(effects).savefig(out / "effects.png", dpi=110)
    text = f"{table_of(effects)}\n{verdict(effects)}"
    atomic_write(out / "table.txt", text + "\n")
    return f"{text}\n{out / 'effects.png'}"
