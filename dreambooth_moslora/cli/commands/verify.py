"""`python -m dreambooth_moslora verify FILE --photos DIR`: trains again by a file's own recipe, and compares the files.

A published file contains the settings of its run (`core.config.recipe`), its base's name and its trigger words,
but nothing private. Missing settings, such as prompts, come from flags, else from --config, else from a guess.
"""

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.cli.parser import add_flag
from dreambooth_moslora.core.config.files import load_settings
from dreambooth_moslora.core.config.recipe import checked_recipe
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.digests import file_digest
from dreambooth_moslora.core.errors import UserError, one_line, spelled_out
from dreambooth_moslora.core.run_files.run_folder import PUBLISHED_NAME

if TYPE_CHECKING:
    from dreambooth_moslora.adapters.files.metadata import AdapterMetadata

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train again by the recipe in a published file, and compare the files"
SAME, DIFFERENT, STOPPED = 0, 1, 130
UNTOLD = (
    *("pretrained_model_name_or_path", "revision", "variant", "pretrained_vae_model_name_or_path"),
    *("instance_prompt", "token", "class_word", "caption_prefix", "caption_suffix", "caption_model"),
    *("mask_model", "mask_prompt", "class_prompt", "prior_prompts", "class_data_dir", "init_adapter"),
    *("token_abstraction", "initializer_concept", "leave_out"),
    *("sample_batch_size", "prior_generation_precision"),
)
"""Settings that affect the training and are not in the file."""
WORDS = ("instance_prompt", "class_prompt", "token", "class_word")
"""Settings of a --config file that are ignored if they describe another subject."""
QUIET = {"num_validation_images": 0, "report_to": "none", "checkpointing_steps": 10**9}
"""Settings of the run that do not affect its steps."""
KNOWN_BASES = ("toy", "stabilityai/stable-diffusion-xl-base-1.0")
"""Bases that are loaded when a file names them. A file from a stranger may name any folder or hub id, so the
user must name others."""
TITLE = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class Receipt:
    """A published file: its metadata, the run's name, and which of a run's two files it is."""

    path: Path
    facts: "AdapterMetadata"
    recipe: dict[str, Any]
    title: str
    is_kohya: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an adapter that this program published, or a run folder")
    parser.add_argument("--photos", metavar="DIR", required=True, help="the photos that it was trained on")
    about_step = "the step of the file, if it is in best/ or its run was stopped"
    parser.add_argument("--step", type=int, metavar="N", help=about_step)
    about_config = "a recipe for settings that the file lacks: those below"
    parser.add_argument("--config", metavar="FILE", help=about_config)
    group = parser.add_argument_group("as in training (default: from the file's words, “a photo of a sks dog”)")
    for item in fields(TrainConfig):
        if item.name in UNTOLD:
            add_flag(group, item)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 for equal weights, 1 for different ones, 130 when the user stops it."""
    receipt = read_receipt(args.file)
    if args.step is not None and args.step < 1:
        raise UserError(f"--step {args.step}: steps count from 1.")
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        config = config_of(args, receipt, Path(scratch) / receipt.title)
        for line in versions_apart(receipt):
            print(spelled_out(f"note: {line}; the weights may differ"), file=sys.stderr)
        if not retrain(config, args.step):
            print("stopped before the comparison", file=sys.stderr)
            return STOPPED
        made = Path(config.output_dir) / (f"{receipt.title}.kohya.safetensors" if receipt.is_kohya else PUBLISHED_NAME)
        return answer(receipt, made, config)


def read_receipt(path: str) -> Receipt:
    """Raises UserError for a file that this program did not publish, and for a recipe that it does not know."""
    from dreambooth_moslora.adapters.files.metadata import AdapterMetadata
    from dreambooth_moslora.adapters.files.tensor_file import read_tensors

    file = Path(path).expanduser()
    file = file / PUBLISHED_NAME if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{path}: there is no such file.")
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
    if facts.basis.get("kind") == "file":
        basis = facts.basis["file"]
        raise UserError(f"{path}: its basis is {basis!r:.80}; train --like it with --basis, and compare.")
    if subjects := len(facts.subject_prompts):
        raise UserError(f"{path}: it was trained on {subjects} subjects; train --like it with --subjects, and compare.")
    title = header.get("modelspec.title", "")
    return Receipt(file, facts, recipe, title if TITLE.fullmatch(title) else "run", "modelspec.title" in header)


def config_of(args: argparse.Namespace, receipt: Receipt, output_dir: Path) -> TrainConfig:
    """The run that makes the file again. Raises UserError."""
    facts, guessed = receipt.facts, {}
    if facts.base_id in KNOWN_BASES and not Path(facts.base_id).exists():
        guessed["pretrained_model_name_or_path"] = facts.base_id
    if facts.trigger_words:
        guessed["instance_prompt"] = f"a photo of a {facts.trigger_words[0]}"
    if facts.class_word and receipt.recipe.get("with_prior_preservation"):
        guessed["class_prompt"] = f"a photo of a {facts.class_word}"
    if facts.tokens:
        guessed["token_abstraction"] = facts.tokens[0]["word"]
    given = {name: value for name, value in vars(args).items() if name in UNTOLD}
    of_file = load_settings(args.config) if args.config else {}
    told = {name: value for name, value in of_file.items() if name in UNTOLD}
    if not all(words in str(told.get("instance_prompt")) for words in facts.trigger_words):
        told = {name: value for name, value in told.items() if name not in WORDS}
    own = {"instance_data_dir": args.photos, "output_dir": str(output_dir)}
    settings = guessed | told | receipt.recipe | given | QUIET | own
    for name in ("pretrained_model_name_or_path", "instance_prompt"):
        if not settings.get(name):
            said = f"; the file says {facts.base_id!r:.80}" if facts.base_id and name != "instance_prompt" else ""
            raise UserError(f"{args.file}: give --{name}{said}.")
    return TrainConfig.from_dict(settings)


def versions_apart(receipt: Receipt) -> list[str]:
    from dreambooth_moslora.adapters.files.metadata import versions

    there, here = receipt.facts.versions, versions()
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return [f"{name} {here.get(name, 'none')} here, {there.get(name, 'none')} in the file" for name in names]


def retrain(config: TrainConfig, step: int | None) -> bool:
    """Train; returns whether the run reached its end, or `step`. Raises UserError when the run has fewer steps."""
    from dreambooth_moslora.cli.progress import TerminalProgress
    from dreambooth_moslora.cli.signals import StopRequest
    from dreambooth_moslora.core.run_files.events import StepDone
    from dreambooth_moslora.training.loop import train
    from dreambooth_moslora.training.planning.checks import preflight
    from dreambooth_moslora.training.planning.memory_plan import planned

    preflight(planned(config))
    progress, done = TerminalProgress(), [0]

    def on_event(event: Any) -> None:
        done[0] = event.step if isinstance(event, StepDone) else done[0]
        progress(event)

    with StopRequest() as stop:
        try:
            result = train(config, on_event, lambda: stop() or done[0] == step)
        finally:
            progress.close()
    if step is not None and result.step != step and not stop():
        raise UserError(f"--step {step}: the run has {result.step} steps.")
    return not stop()


def answer(receipt: Receipt, made: Path, config: TrainConfig) -> int:
    """Print the result, and return the exit code."""
    from dreambooth_moslora.adapters.files.file_difference import difference_of

    digest, digest_made = file_digest(receipt.path), file_digest(made)
    if digest == digest_made:
        print(f"equal: the same file, sha256 {digest}")
        return SAME
    found = difference_of(receipt.path, made)
    if not found.count:
        names = ", ".join(found.header) or "the order of its parts"
        print(spelled_out(f"equal: the weights are the same, bit for bit; the header differs in {names}"))
        return SAME
    print(f"differs: sha256 {digest} of the file, {digest_made} of the one that training gave")
    lines = [f"{found.count} of {found.total} tensors differ, the first: {found.first}", *versions_apart(receipt)]
    values = {name: getattr(config, name) for name in UNTOLD}
    taken = [f"{name} = {value!r}" for name, value in values.items() if value]
    lines.append(f"not in the file, and assumed: {', '.join(taken)}")
    for line in lines:
        print(spelled_out(f"  {line}"))
    return DIFFERENT
