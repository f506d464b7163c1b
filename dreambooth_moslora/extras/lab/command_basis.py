"""`python -m dreambooth_moslora basis DIR… --out basis.safetensors`: A and B that many subjects share."""

import argparse
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

from dreambooth_moslora.cli import terminal, train
from dreambooth_moslora.core import SUBJECT_FILE, UserError, find_asset
from dreambooth_moslora.disk.run_folder import BASIS_SUFFIX
from dreambooth_moslora.extras.cluster.subjects import prompts_of
from dreambooth_moslora.settings.sources import read_json_table
from dreambooth_moslora.settings.table import SAID_BY_SUBJECTS, SVD, TrainConfig, check_number

EVERY_SEC = 5.0
GROUPS_OF_RUNS = ("optimizer", "samples and evaluation", "run folder", "hub")
OF_RUNS = (
    *(item.name for item in fields(TrainConfig) if item.metadata["group"] in GROUPS_OF_RUNS),
    *("instance_data_dir", "dataset_name", "dataset_config_name", "image_column", "caption_column", "subjects"),
    *("instance_prompt", "class_prompt", "token", "class_word", "enable_bucket", "mixer", "mixer_lr_scale"),
    *("gradient_accumulation_steps", "text_encoder_lr", "scale_lr", "lr_scheduler", "lr_warmup_steps"),
    *("lr_num_cycles", "lr_power", "use_ema", "ema_decay", "train_text_encoder_ti_frac", "token_abstraction"),
    *("num_new_tokens_per_abstraction", "initializer_concept"),
)
"""Settings of a run that a basis has no use for: as flags they are refused, in a file they are left out."""
OF_FILES = (*OF_RUNS, *SAID_BY_SUBJECTS)
"""Of the subject in a file, too, what a flag may say of all: `--mask_prompt toy`."""


def basis_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folders of photos, each with its subject.json")
    parser.add_argument("--out", metavar="FILE", required=True, help=f"its file: a name ending in {BASIS_SUFFIX}")
    parser.add_argument("--basis_lr", type=float, default=1e-3, help="learning rate of A and B (default: 0.001)")
    train.add_training_flags(parser, hidden=OF_RUNS)


def run_basis(args: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(args).items() if name not in ("folders", "out", "basis_lr")}
    check_number("basis_lr", args.basis_lr, low=0, high=100)  # as --learning_rate
    out = Path(args.out)
    if not out.name.endswith(BASIS_SUFFIX):
        raise UserError(f"--out {out}: its name must end in {BASIS_SUFFIX}, such as toys_{BASIS_SUFFIX}.")
    if out.exists():
        raise UserError(f"--out {out}: it is there already, and mixers may need it; give another name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")
    config = config_of(args.folders, taken(flags))
    from dreambooth_moslora.extras.lab.basis import learn_basis
    from dreambooth_moslora.plan.checks import check_settings

    check_settings(config)
    last = [0.0]

    def progress(done: int, total: int, loss: float, eta_sec: float) -> None:
        if done in (1, total) or time.monotonic() - last[0] > EVERY_SEC:
            last[0] = time.monotonic()
            print(f"step {done} of {total}, loss {loss:.3f}, {eta_sec:.0f} s left", file=sys.stderr, flush=True)

    with terminal.StopRequest() as stop:
        done = learn_basis(config, out, args.basis_lr, progress, stop)
    if done:
        print(out)
    return terminal.INTERRUPTED if stop() else 0


def taken(flags: dict) -> dict:
    """The settings of flags and files that a basis has. Raises UserError for another flag."""
    for name in OF_RUNS:
        if name in flags:
            raise UserError(
                f"--{name}: basis has no such flag. It takes the subjects from their folders, crops photos in their "
                "own shapes, and learns by AdamW with falling rates, in one go."
            )
    return {name: value for name, value in train.settings_of(flags)[0].items() if name in flags or name not in OF_FILES}


def config_of(folders: list[str], settings: dict) -> TrainConfig:
    """The settings of one run with a subject for each folder. Raises UserError."""
    tables, seen = [table_of(folder) for folder in folders], Counter()
    for table in tables:
        prompt = table["instance_prompt"]
        seen[prompt] += 1
        if seen[prompt] > 1:  # prompts must differ; each subject has a mixer of its own
            table["instance_prompt"] = f"{prompt} {seen[prompt]}"
    fixed = {"subjects": tables, "output_dir": "basis", "report_to": "none"}
    return TrainConfig.from_dict({"basis": SVD, **settings, **fixed})


def table_of(folder: str) -> dict[str, str]:
    """The settings of the subject in a folder. Raises UserError when nothing there says what it is."""
    place = Path(find_asset(folder))
    if not place.is_dir():
        raise UserError(f"{folder}: there is no such folder.")
    file = place / SUBJECT_FILE
    facts = read_json_table(file) if file.is_file() else {}
    token, word = facts.get("token"), facts.get("class_word")
    if not (token and word):
        raise UserError(f'{folder}: write {SUBJECT_FILE} into it, such as {{"token": "sks", "class_word": "dog"}}.')
    return {"instance_data_dir": str(place), **prompts_of(token, word)}
