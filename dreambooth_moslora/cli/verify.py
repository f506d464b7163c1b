"""`python -m dreambooth_moslora verify FILE --photos DIR`: trains again by a file's own recipe, and compares the files.

A published file contains the settings of its run (`settings.sources`), its base's name and its trigger words, but
nothing private (`adapters.metadata`). Missing settings, such as prompts, come from flags, else from --config, else
from a guess. Weights that differ after a guess prove nothing: the answer is then that it cannot be told.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_moslora.adapters.metadata import (
    RESUMED,
    UNTOLD,
    AdapterMetadata,
    concluded,
    notes_in,
    told_by,
    versions,
)
from dreambooth_moslora.base.files import resolve_base
from dreambooth_moslora.cli.terminal import StopRequest, TerminalProgress
from dreambooth_moslora.cli.train import add_flag, settings_of
from dreambooth_moslora.core import UserError, file_digest, find_asset, one_line, spelled_out, user_path
from dreambooth_moslora.disk import events, run_folder
from dreambooth_moslora.photos.folder import require_folder_of_photos
from dreambooth_moslora.settings.sources import checked_recipe, load_settings
from dreambooth_moslora.settings.table import SAID_BY_SUBJECTS, SETTINGS, TrainConfig, checked_setting, shapes_weights

SAME, DIFFERENT, UNKNOWN, STOPPED = 0, 1, 2, 130
FLAGS = ("pretrained_model_name_or_path", "token", "class_word", "token_abstraction", *UNTOLD)
"""Settings that affect the training and that the recipe in the file may lack."""
WORDS = ("instance_prompt", "class_prompt", "token", "class_word")  # Ignored in --config for another subject
OF_SOURCE = ("subjects", "dataset_name", "dataset_config_name", "image_column", "caption_column")
"""Settings of a --config file that --photos replaces."""
QUIET = {"num_validation_images": 0, "report_to": "none", "checkpointing_steps": 10**9}  # They affect no step
ROUNDING = 1.0  # ‖ΔW − ΔW'‖ / ‖ΔW‖ that other rounding may explain: it grows with the steps.
TITLE = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class Receipt:
    path: Path
    facts: AdapterMetadata
    recipe: dict[str, Any]
    title: str  # the run's name
    is_kohya: bool  # which of a run's two files it is


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an adapter that this program published, or a run folder")
    about_photos = "the photos that it was trained on (of several subjects: --subjects)"
    parser.add_argument("--photos", metavar="DIR", help=about_photos)
    about_step = "the step of the file, if it is in best/ or its run was stopped"
    parser.add_argument("--step", type=int, metavar="N", help=about_step)
    about_config = "a recipe for settings that the file lacks: those below"
    parser.add_argument("--config", metavar="FILE", help=about_config)
    about_rest = "take what neither the file, --config nor a flag tells as not set, also if the file does not say so"
    parser.add_argument("--nothing_else", action="store_true", help=about_rest)
    group = parser.add_argument_group("as in training (default: from the file's words, “a photo of a sks dog”)")
    for name in (name for name in SETTINGS if name in FLAGS):
        add_flag(group, SETTINGS[name])


def run_verify(args: argparse.Namespace) -> int:
    """Exit code 0 for equal weights, 1 for different ones, 2 when that cannot be told, 130 when the user stops it."""
    check_paths(args)
    receipt = read_receipt(args.file)
    if args.step is not None and args.step < 1:
        raise UserError(f"--step {args.step}: steps count from 1.")
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        config = config_of(args, receipt, Path(scratch) / receipt.title)
        for line in versions_apart(receipt):
            print(spelled_out(f"note: {line}; the weights may differ"), file=sys.stderr)
        if not retrain(config, args.step or receipt.facts.step):
            print("stopped before the comparison", file=sys.stderr)
            return STOPPED
        run = run_folder.RunDir(config.output_dir)
        made = run.kohya_path if receipt.is_kohya else run.adapter_path
        return answer(receipt, made, config, unknown_settings(args, receipt, config))


def check_paths(args: argparse.Namespace) -> None:
    """Raises UserError for a path that is not there or a recipe that `train` refuses, before torch is imported."""
    if args.photos:
        require_folder_of_photos(Path(find_asset(args.photos)))
    settings_of({"config": args.config, "like": None})
    if base := given_flags(args).get("pretrained_model_name_or_path"):
        resolve_base(base)


def read_receipt(path: str) -> Receipt:
    """Raises UserError for a file that this program did not publish, and for a recipe that it does not know."""
    file = Path(find_asset(path))
    file = file / run_folder.PUBLISHED_NAME if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{path}: there is no such file.")
    from dreambooth_moslora.adapters.raw_file import read_tensors

    tensors, header = read_tensors(file)
    try:
        facts = AdapterMetadata.from_json(header.get("moslora", ""))
    except (TypeError, ValueError):
        raise UserError(f"{path}: this program did not publish it, or the header is damaged.") from None
    recipe, wrong = checked_recipe(facts.recipe)
    if wrong:
        raise UserError(f"{path}: of its recipe, some is not known here: {one_line('; '.join(wrong))}.")
    if "seed" not in recipe or "raw_format" in tensors:
        raise UserError(f"{path}: it holds no recipe; a file that a whole run published does.")
    if set(tensors) == {"mixers"}:
        raise UserError(f"{path}: it holds mixers alone; give the LoRA file beside it.")
    if facts.processes:
        raise UserError(
            f"{path}: {facts.processes} processes trained it, and verify is one; train --like it with as many, and "
            "compare."
        )
    title = header.get("modelspec.title", "")
    return Receipt(file, facts, recipe, title if TITLE.fullmatch(title) else "run", "modelspec.title" in header)


def config_of(args: argparse.Namespace, receipt: Receipt, output_dir: Path) -> TrainConfig:
    """The run that makes the file again. Raises UserError."""
    facts = receipt.facts
    told = concluded(facts) | told_in_config(args, facts) | receipt.recipe | given_flags(args)
    check_source(args, facts, told)
    own = {"output_dir": str(output_dir)} | ({"instance_data_dir": args.photos} if args.photos else {})
    by_subject = SAID_BY_SUBJECTS if told.get("subjects") else ()
    settings = {name: value for name, value in told.items() if name not in by_subject}
    needed = ("pretrained_model_name_or_path", *(() if told.get("subjects") else ("instance_prompt",)))
    for name in needed:
        if not settings.get(name):
            said = f"; the file says {facts.base_id!r:.80}" if facts.base_id and name != "instance_prompt" else ""
            raise UserError(f"{args.file}: give --{name}{said}.")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") and "mixed_precision" not in receipt.recipe:
        own["mixed_precision"] = "no"
    return TrainConfig.from_dict(settings | QUIET | own)


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in FLAGS}


def told_in_config(args: argparse.Namespace, facts: AdapterMetadata) -> dict[str, Any]:
    """Settings of the --config file that the recipe may lack, without those of another subject. Raises UserError."""
    of_file = load_settings(args.config) if args.config else {}
    told = {name: value for name, value in of_file.items() if name in FLAGS}
    left_out = OF_SOURCE if args.photos else ()
    if not all(words in str(told.get("instance_prompt")) for words in facts.trigger_words):
        left_out += WORDS
    return {name: value for name, value in told.items() if name not in left_out}


def check_source(args: argparse.Namespace, facts: AdapterMetadata, told: Mapping[str, Any]) -> None:
    """Raises UserError unless there are photos, as many subjects as the file has, and its basis."""
    if not (args.photos or told.get("subjects") or told.get("dataset_name")):
        raise UserError(f"{args.file}: give --photos, or --subjects if there are several.")
    if facts.subject_prompts and not told.get("subjects"):
        raise UserError(f"{args.file}: it was trained on {len(facts.subject_prompts)} subjects; give --subjects.")
    prompts = tuple(table.instance_prompt for table in checked_setting("subjects", told.get("subjects") or ()))
    if facts.subject_prompts and prompts != facts.subject_prompts:
        raise UserError(f"{args.file}: its subjects are {one_line(', '.join(facts.subject_prompts), 300)}.")
    if facts.basis.get("kind") == "file":
        file = user_path(str(told.get("basis")))
        if not file.is_file() or file_digest(file) != facts.basis["sha256"]:
            raise UserError(f"{args.file}: its basis is {facts.basis['file']!r:.80}; give that file with --basis.")


def unknown_settings(args: argparse.Namespace, receipt: Receipt, config: TrainConfig) -> list[str]:
    """A line about each setting that shaped the file and is not known."""
    facts, lines = receipt.facts, []
    given = given_flags(args).keys() | told_in_config(args, facts).keys()
    if told_by(facts):
        for name in (name for name in facts.withheld if name not in given):
            if name == RESUMED:
                lines.append("the run was resumed with other settings or photos than it began with")
            elif name not in UNTOLD:
                lines.append(f"it was made with the setting {name:.80}, which no flag here tells")
            else:
                lines.append(f"it was made with --{name}, whose value is not in the file; give it")
    elif not args.nothing_else:
        names = [name for name in UNTOLD if shapes_weights(name, config) and name not in (*given, *OF_SOURCE)]
        names = [name for name in names if name not in receipt.recipe] + ["step"] * (args.step is None)
        flags = ", ".join(f"--{name}" for name in names)
        lines = [
            f"the file does not list its private settings, and earlier versions never did: {flags}",
            "tell what was set of these; --nothing_else says that no other was",
        ]
    return lines


def versions_apart(receipt: Receipt) -> list[str]:
    there, here = receipt.facts.versions, versions()
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return [f"{name} {here.get(name, 'none')} here, {there.get(name, 'none')} in the file" for name in names]


def retrain(config: TrainConfig, step: int | None) -> bool:
    """Train; returns whether the run reached its end, or `step`. Raises UserError when the run has fewer steps."""
    from dreambooth_moslora.training.loop import train

    progress, done = TerminalProgress(), [0]

    def on_event(event: Any) -> None:
        done[0] = event.step if isinstance(event, events.StepDone) else done[0]
        progress(event)

    with StopRequest() as stop:
        try:
            result = train(config, on_event, lambda: stop() or done[0] == step)
        finally:
            progress.close()
    if step is not None and result.step != step and not stop():
        raise UserError(f"--step {step}: the run has {result.step} steps.")
    return not stop()


def tokens_told(file: Path) -> list[tuple]:
    """Word, count and digest of each file of new tokens that the header names; the files' names are the run's."""
    return [(note["word"], note["count"], note["sha256"]) for note in notes_in(run_folder.header_of(file))]


def answer(receipt: Receipt, made: Path, config: TrainConfig, unknown: list[str]) -> int:
    """Print the result, and return the exit code. `unknown`: lines about settings that are not known."""
    from dreambooth_moslora.adapters.describe import difference_of

    digest, digest_made = file_digest(receipt.path), file_digest(made)
    if digest == digest_made:
        print(f"equal: the same file, sha256 {digest}")
        return SAME
    found = difference_of(receipt.path, made)
    has_same_tokens = tokens_told(receipt.path) == tokens_told(made)
    if not found.count and has_same_tokens:
        names = ", ".join(found.header) or "the order of its parts"
        print(spelled_out(f"equal: the weights are the same, bit for bit; the header differs in {names}"))
        return SAME
    reasons = [*unknown]
    if found.is_cast:
        reasons.append("it has other shapes or types than its run gave it, as after an export; give the run's own file")
    elif found.of_updates <= ROUNDING:
        reasons.append(
            f"the two differ by {found.of_updates:.1e} of the adapter, as they can by rounding: on another kind of "
            "processor, with other numbers of threads or versions, or beside other runs; where all these are the same, "
            "it is another run's file"
        )
    digests = f"sha256 {digest} of the file, {digest_made} of the one that training gave"
    print("cannot tell: the weights differ, and not all that made them is known" if reasons else f"differs: {digests}")
    lines = [*reasons, digests] if reasons else []
    if found.count:
        lines.append(f"{found.count} of {found.total} tensors differ, the first: {found.first}")
    if not has_same_tokens:
        lines.append("the new tokens differ")
    values = {name: getattr(config, name) for name in FLAGS if name not in receipt.facts.public}
    taken = [f"{name} = {value!r}" for name, value in values.items() if value]
    lines += [*versions_apart(receipt), f"not in the file, and assumed: {', '.join(taken)}"]
    for line in lines:
        print(spelled_out(f"  {line}"))
    return UNKNOWN if reasons else DIFFERENT
