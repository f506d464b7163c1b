"""The command line of training: a parser made from the table of settings; defaults < --like < --config < flags.

Flags may have underscores or hyphens. A switch may be written `--flag`, `--flag false` or `--no_flag`. For a flag of
another trainer or of an earlier version the error says what to give instead.

`train photos/dog dog` chooses every other setting for a folder and a word, with one line about each choice. A --config
file replaces the recipe.
"""

import argparse
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dreambooth_moslora import __version__
from dreambooth_moslora.cli.terminal import say
from dreambooth_moslora.core import MAX_WORD_CHARACTERS, SUBJECT_FILE, UserError, find_asset, free_name, is_toy
from dreambooth_moslora.plan.choices import (
    USUAL_EXPOSURES,
    Choices,
    choose_recipe,
    choose_scores,
    choose_steps,
    choose_words,
)
from dreambooth_moslora.plan.memory import STOCK_SDXL, in_lines, is_alone, least_free_gib, same_for_all
from dreambooth_moslora.settings.rows import WORDS, Prompt, Subject, nearest
from dreambooth_moslora.settings.sources import load_settings, settings_like
from dreambooth_moslora.settings.table import FIELD_TYPES, REMOVED, SETTINGS, TrainConfig, check_each, checked_setting

REMOVED_FLAGS = {
    **REMOVED,
    "leave_one_out": "removed, as it found one bad photo of two; to train without a photo, use --leave_out FILE",
}
"""Flags of earlier versions, which every command answers."""
FOREIGN = {
    # earlier versions of diffusers' script, and its siblings
    "crops_coords_top_left_h": "each photo's own crop is told to the model; there is nothing to set",
    "crops_coords_top_left_w": "each photo's own crop is told to the model; there is nothing to set",
    "set_grads_to_none": "gradients are always set to none; leave it out",
    "pre_compute_text_embeddings": "frozen text encoders are always asked once only; leave it out",
    "tokenizer_max_length": "SDXL's text encoders read 77 tokens; leave it out",
    "text_encoder_use_attention_mask": "SDXL's text encoders take no attention mask; leave it out",
    "clip_skip": "SDXL takes the last layer but one of its text encoders, and so does this program; leave it out",
    "class_labels_conditioning": "it belongs to other models than SDXL",
    "skip_save_text_encoder": "text encoders are saved only as adapters; leave it out",
    "offset_noise": "use --noise_offset 0.1",
    "train_text_encoder_frac": "not supported: the text encoders are trained all along or not at all",
    "adam_weight_decay_text_encoder_ti": "new tokens are never decayed; leave it out",
    "enable_t5_ti": "SDXL has no T5 encoder; --train_text_encoder_ti learns tokens in both of its own",
    "placeholder_token token_string": "use --train_text_encoder_ti with --token_abstraction",
    "initializer_token init_word": "use --train_text_encoder_ti with --initializer_concept",
    "num_vectors num_vectors_per_token": "use --train_text_encoder_ti with --num_new_tokens_per_abstraction",
    "use_blora": "use --target_modules blora_content blora_style",
    "lora_unet_blocks": "use --target_modules, which takes the same names of blocks",
    "validation_negative_prompt": "not supported: samples are drawn without a negative prompt",
    "validation_image": "not supported: samples are drawn from --validation_prompt",
    "enable_npu_flash_attention": "not supported: PyTorch's own attention is used",
    "cache_latents": "latents are always cached; --caching {memory,disk,off} says where",
    "offload": "encoders always leave memory after the photos are encoded; leave it out",
    "upcast_before_saving": "adapters are kept in fp32 all along; leave it out",
    "optimizer_type": f"use --optimizer {{{','.join(SETTINGS['optimizer'].metadata['choices'])}}}",
    "optimizer_args": "use --adam_beta1, --adam_weight_decay and their like, one flag each",
    "optimizer_schedulefree_wrapper": "use --optimizer AdamWScheduleFree",
    "concepts_list concept_list": "use --subjects, which takes the same file",
    # kohya-ss/sd-scripts
    "network_module": "there is one kind of adapter; --mixer none makes it a plain LoRA",
    "network_args": "use --rank, --lora_alpha, --rank_pattern, --alpha_pattern, --target_modules, --use_dora",
    "conv_dim": "use --target_modules with *conv* beside the projections, and --rank_pattern *conv*=N",
    "conv_alpha": "use --alpha_pattern *conv*=N",
    "block_dims network_reg_dims": "use --rank_pattern, such as down_blocks.2.*=8",
    "block_alphas": "use --alpha_pattern, such as down_blocks.2.*=4",
    "dim_from_weights": "a file of another rank is converted to --rank; leave it out",
    "network_train_unet_only": "the text encoders are frozen unless --train_text_encoder; leave it out",
    "train_data_dir": "use --instance_data_dir, or --subjects where each folder in it is another subject",
    "dataset_config": "use --subjects, or [[subjects]] tables in a --config file",
    "reg_data_dir": "use --class_data_dir with --with_prior_preservation",
    "output_name": "the files are named by --output_dir",
    "save_precision": "the adapter is saved in its own precision; leave it out",
    "save_model_as": "adapters are always safetensors; leave it out",
    "caption_strategy": "captions are name.txt, metadata.jsonl or the instance prompt; --captions auto makes them",
    "caption_extension": "captions are the lines of name.txt beside each photo",
    "caption_dropout_every_n_epochs": "use --caption_dropout, a share of all exposures",
    "caption_tag_dropout_rate": "not supported: --caption_dropout leaves out a caption as a whole",
    "caption_separator": "tags are what stands between commas; leave it out",
    "min_bucket_reso max_bucket_reso": "sides lie between half and twice --resolution; leave it out",
    "bucket_no_upscale": "not supported: a small photo is enlarged to the area of --resolution",
    "aspect_ratio_buckets": "use --enable_bucket, which finds the sizes by itself",
    "adaptive_noise_scale": "not supported: --noise_offset is the same for all photos",
    "multires_noise_iterations": "not supported: use --noise_offset",
    "huber_scale": "use --huber_c, the width itself",
    "masked_loss": "name.mask.png beside a photo is always used, and --masks auto makes what is missing; leave it out",
    "alpha_mask": "a photo's transparency is its mask unless --alpha white; leave it out",
    "no_half_vae": "the VAE always computes in fp32; leave it out",
    "cache_text_encoder_outputs": "text embeddings are always computed once; leave it out",
    "xformers sdpa": "PyTorch's own memory-efficient attention is used; leave it out",
    "torch_compile dynamo_backend": "use --compile on",
    "v_parameterization": "read from the base's scheduler; leave it out",
    "use_face_segmentation_condition": "use --masks auto --mask_prompt face",
}
"""Flags of other trainers -> what to give instead."""
FOREIGN_FLAGS = {
    **REMOVED_FLAGS,
    **{flag: f"use --{name}" for name, item in SETTINGS.items() for flag in item.metadata["elsewhere"].split()},
    **{flag: instead for flags, instead in FOREIGN.items() for flag in flags.split()},
}


def name_of(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-")


def unknown_flag_message(word: str) -> str:
    """The error message for an argument that no flag takes."""
    if not word.startswith("-"):
        return f"`{word}` belongs to no flag: a prompt of several words goes in quotes."
    flag, name = word.partition("=")[0], name_of(word)
    if name in FOREIGN_FLAGS:
        return f"{flag}: {FOREIGN_FLAGS[name]}."
    close = nearest(name.removeprefix("no_"), FIELD_TYPES)
    return f"unknown flag {flag}" + (f": did you mean --{close}?" if close else "; see --help.")


DESCRIPTION = "Teach an SDXL model one subject from a few photos, through a MoSLoRA adapter (arXiv 2406.11909)."
SCRIPT = "train_dreambooth.py"
EXAMPLE = """examples:
  {command} photos/dog dog
      a folder and a word: the program chooses and prints the rest, and any flag below overrides it
  {command} --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
    --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" --output_dir runs/dog --max_train_steps 500
  {command} --config assets/configs/quickstart.toml

Flags are those of diffusers' train_dreambooth_lora_sdxl.py, and more. Switches are undone by --no_SWITCH.
Ctrl-C finishes the step and saves; --resume_from_checkpoint latest goes on."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for a mistake. `is_of_training`: it takes the settings of a run."""

    is_of_training = False

    def __init__(self, *args: Any, **kwargs: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": formatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        word = unknown.split()[0]
        if unknown != message and (self.is_of_training or name_of(word) in REMOVED_FLAGS):
            raise UserError(unknown_flag_message(word))
        raise UserError(f"{message}; see {self.prog} --help.")


def underscored(argv: Sequence[str]) -> list[str]:
    """`--train-batch-size=1` -> `--train_batch_size=1`; values do not change."""
    words = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            word = f"--{name.replace('-', '_')}{equals}{value}"
        words.append(word)
    return words


def build_train_parser(prog: str = SCRIPT) -> Parser:
    """`prog` is the command that was started, for the usage and the examples."""
    command = f"python {SCRIPT}" if prog == SCRIPT else prog
    parser = Parser(prog=prog, description=DESCRIPTION, epilog=EXAMPLE.format(command=command))
    parser.add_argument("--version", action="version", version=__version__)
    about = (
        "put the run at the end of the queue beside its --output_dir and return; `queue start` or the page trains it"
    )
    parser.add_argument("--queue", action="store_true", help=about)
    add_training_flags(parser)
    return parser


def add_training_flags(parser: "Parser", hidden: Collection[str] = ()) -> None:
    """Add `--config`, `--like`, and a flag for each setting; flags that are not given are not in the result. `hidden`
    flags are not in the help; the command that uses this explains them."""
    parser.is_of_training = True
    parser.add_argument("--config", metavar="FILE", help="settings from a .toml or .json file; flags override them")
    about_like = "settings from a published adapter file, also kohya's; flags and --config override them"
    parser.add_argument("--like", metavar="FILE", help=about_like)
    for title, rows in groupby(SETTINGS.values(), lambda item: item.metadata["group"]):
        group = parser.add_argument_group(title)
        for item in rows:
            add_flag(group, item, is_hidden=item.name in hidden)


METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "NAME", Prompt: "TEXT", Subject: "DIR"}


def add_flag(group: Any, item: Field, *, is_hidden: bool = False) -> None:
    base, facts, default = FIELD_TYPES[item.name][0], item.metadata, item.default
    note = ""
    if facts["required"]:
        note = " (required)"
    elif not (default is None or default is False or default == ()):
        note = f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
    about = argparse.SUPPRESS if is_hidden else (facts["help"] + note).replace("%", "%%")
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": about}
    if base is bool:
        group.add_argument(f"--{item.name}", nargs="?", const=True, metavar="true|false", **options)
        options |= {"help": argparse.SUPPRESS}
        group.add_argument(f"--no_{item.name}", action="store_const", const=False, **options)
    else:
        metavar = "{" + ",".join(facts["choices"]) + "}" if facts["choices"] else METAVARS[base]
        group.add_argument(f"--{item.name}", nargs="+" if base in (tuple, Prompt) else None, metavar=metavar, **options)


def parse_train_config(argv: Sequence[str], prog: str = SCRIPT) -> TrainConfig:
    """The resolved settings of a command line. Raises UserError; SystemExit for --help and --version."""
    return parse_training(argv, prog)[0]


def parse_training(argv: Sequence[str], prog: str = SCRIPT) -> tuple[TrainConfig, bool, Any]:
    """Like `parse_train_config`; also returns whether the run should wait in the queue, and the `PhotoReport` if the
    choices have read the photos. The launcher's LOCAL_RANK overrides --local_rank. Raises UserError."""
    said = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    for name, value in said.items():
        if not value.removeprefix("-").isdecimal():
            raise UserError(f"{name}={value} in the environment: expected a whole number, as a launcher sets it.")
    rank = int(said.get("LOCAL_RANK", "-1"))
    given = same_for_all(lambda: given_by(argv, prog), lambda own: "\n".join([*own.words, in_lines(own.settings)]))
    choices = choose(given) if given.words else Choices(given.settings)
    require(choices.all)
    config = TrainConfig.from_dict(choices.all | ({"local_rank": rank} if rank != -1 else {}))
    return config, given.is_queued, choices.photo_report


class Given(NamedTuple):
    """What a command line and its files say, before the words choose the other settings. `has_recipe`: a file replaces
    the recipe. `is_queued`: the run will have the whole GPU."""

    words: list[str]
    settings: dict[str, Any]
    has_recipe: bool
    is_queued: bool


def given_by(argv: Sequence[str], prog: str) -> Given:
    """Raises UserError; SystemExit for --help and --version."""
    if not argv:
        raise UserError(f"say which photos to train, and what they show, {AS_ONE_WORD}; --help shows the flags.")
    argv = underscored(argv)
    first_flag = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    words = argv[:first_flag]
    found, unknown = build_train_parser(prog).parse_known_args(argv[first_flag:])
    if not words and len(unknown) == 2 and Path(find_asset(unknown[0])).is_dir():  # words after the flags
        words, unknown = unknown, []
    if unknown:
        raise UserError(unknown_flag_message(unknown[0]))
    flags = vars(found)
    is_queued = flags.pop("queue")
    settings, has_recipe = settings_of(flags, without_words=bool(words))
    return Given(words, settings, has_recipe, is_queued)


def settings_of(flags: dict[str, Any], *, without_words: bool = False) -> tuple[dict[str, Any], bool]:
    """The settings of parsed flags and of the files of --config and --like, and whether there is such a file.
    `without_words`: a folder and a word replace a --config file's own subject. Raises UserError."""
    flags = dict(flags)
    file, like = flags.pop("config"), flags.pop("like")
    recipe = load_settings(file) if file else {}
    like_of_file = recipe.pop("like", None)
    like = like or like_of_file
    given = {*flags, WORDS} if without_words else {*flags}
    gone = [name for name in recipe if name in SETTINGS and given.intersection(SETTINGS[name].metadata["yields_to"])]
    settings = {name: value for name, value in recipe.items() if name not in gone} | flags
    settings = check_each(settings)
    if like:
        taken, lines = settings_like(str(like), settings)
        settings = taken | settings
        say(lines)
    return settings, bool(file or like)


def require(settings: Mapping[str, Any]) -> None:
    """Raises UserError for missing settings."""
    missing = []
    for item in SETTINGS.values():
        is_said_by_subjects = item.metadata["per_subject"] and settings.get("subjects")
        if item.metadata["required"] and not is_said_by_subjects and not str(settings.get(item.name, "")).strip():
            missing.append(f"--{item.name}")
    if not any(settings.get(name) for name in ("subjects", "instance_data_dir", "dataset_name")):
        missing.append("--instance_data_dir (or --dataset_name)")
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; give it as a flag or in a --config file, or see --help.")


RUNS = Path("runs")
AS_ONE_WORD = "as in `train photos/dog dog`"


def choose(given: Given) -> Choices:
    """All settings for the photos and the class in the given words; flags and files override the choices, each of which
    is printed. Raises UserError for a missing folder or word, and for a folder without photos."""
    from dreambooth_moslora.photos.folder import photo_report

    folder, word = folder_and_word(given.words)
    settings = {name: checked_setting(name, value) for name, value in given.settings.items()}
    if settings.get("instance_data_dir"):
        raise UserError(f"{given.words[0]} and --instance_data_dir: give the folder of photos once.")
    choices = Choices(settings, {"instance_data_dir": str(folder)})
    choose_base(choices, folder)
    is_for_toys = is_toy(choices.all["pretrained_model_name_or_path"])
    free_gib = None if is_for_toys else least_free_gib(is_later=given.is_queued)
    exposures = USUAL_EXPOSURES if given.has_recipe else choose_recipe(choices, free_gib)
    choose_words(choices, word)
    output = run_folder(word, resumes=bool(settings.get("resume_from_checkpoint")))
    choices.add(f"output: {output}", "output_dir", output_dir=str(output))
    choices.photo_report = photo_report(TrainConfig.from_dict(choices.all | {"early_stopping": None}))
    choose_steps(choices, exposures, choices.photo_report.photos)
    choose_scores(choices, choices.photo_report.photos)
    say(choices.lines)
    return choices


def choose_base(choices: Choices, folder: Path) -> None:
    base, said = STOCK_SDXL, STOCK_SDXL
    if (folder / SUBJECT_FILE).is_file():
        base, said = "toy", "the embedded one, as the photos are of its world"
    elif least_free_gib() is None:
        base, said = "toy", "the embedded one, as there is no GPU here, and the embedded base knows toys alone"
    choices.add(f"base: {said}", "pretrained_model_name_or_path", pretrained_model_name_or_path=base)


def folder_and_word(words: list[str]) -> tuple[Path, str]:
    """The folder of photos and the class. Raises UserError."""
    folder, word = Path(find_asset(words[0])), " ".join(words[1:2]).strip()
    if not folder.is_dir():
        kind = "it is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{words[0]}: {kind}; give the folder of photos first, then the word, {AS_ONE_WORD}.")
    if not word or "/" in word:
        raise UserError(f"{words[0]}: say in one word what it shows, {AS_ONE_WORD}.")
    if len(word) > MAX_WORD_CHARACTERS:
        raise UserError(f"the word has {len(word)} letters; at most {MAX_WORD_CHARACTERS} are allowed, {AS_ONE_WORD}.")
    if len(words) > 2:
        raise UserError(f"`{words[2]}` belongs to no flag: a class of several words goes in quotes, {AS_ONE_WORD}.")
    return folder, word


def run_folder(word: str, resumes: bool) -> Path:
    """`runs/dog`, or a free name like it; for a resumed run, the latest of these names. Several processes cannot each
    find a free name: they use the first one, and an earlier run there is moved away."""
    name = re.sub(r"[^\w-]+", "_", word)[:60].strip("_") or "run"
    if not is_alone():
        return RUNS / name
    if not resumes:
        return RUNS / free_name(name, lambda taken: (RUNS / taken).exists())
    there = [path for path in RUNS.glob("*") if re.fullmatch(rf"{re.escape(name)}(_\d+)?", path.name)]
    return max(there, key=lambda path: (len(path.name), path.name), default=RUNS / name)
