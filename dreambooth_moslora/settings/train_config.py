"""Table of all settings of a training run: each is one row of `TrainConfig`.

A row has the setting's name, type, default and help, and the facts of `field_facts.FieldFacts`:
bounds, choices, whether a published file contains it, when it has no effect, its names elsewhere.
The command line, the configuration files, the header of a published file, the remarks before a run
and the list in `docs/settings.md` are made from the rows. A rule between several settings is a
sentence in `rules`.
"""

import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields, make_dataclass
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import (
    field_facts,
    lr_schedules,
    optimizers,
    rules,
    subject_kinds,
    subjects,
)
from dreambooth_moslora.values import is_number

if TYPE_CHECKING:
    from typing import Unpack

    from dreambooth_moslora.settings.train_settings import TrainSettings

MIXERS = ["orthogonal", "identity", "kaiming", "butterfly", "none"]
"""Initial values of the r x r matrix between A and B; `none` is a plain LoRA."""
START_FILE_SETTINGS = ("init_adapter", "companion", "pretrained_vae_model_name_or_path")
"""Files that a training begins with: other content makes another run."""
MEMORY_PLANS: dict[str, dict[str, object]] = {
    "full": {},
    "recompute_ff": {"recompute_feed_forward": True},
    "recompute": {"gradient_checkpointing": True},
    "int8": {"gradient_checkpointing": True, "base_quantization": "int8"},
    "nf4": {"gradient_checkpointing": True, "base_quantization": "nf4"},
    "stream": {"gradient_checkpointing": True, "stream_blocks": True},
    "int8_stream": {
        "gradient_checkpointing": True,
        "base_quantization": "int8",
        "stream_blocks": True,
    },
    "nf4_stream": {
        "gradient_checkpointing": True,
        "base_quantization": "nf4",
        "stream_blocks": True,
    },
}
"""Plans of `--memory`, from the fastest to the leanest; the last is the fallback when none fits."""
MEMORY_PLAN_SETTINGS = (
    *dict.fromkeys(name for plan in MEMORY_PLANS.values() for name in plan),
    "images_at_once",
)
"""Settings that a plan of `--memory` decides, besides the precision."""


def ignore_unless_optimizer_uses(setting: str) -> field_facts.IgnoredCases:
    """Make a setting idle with optimizers that do not take it."""
    return field_facts.ignore_when(
        "with --optimizer {optimizer}",
        lambda run: not optimizers.get_optimizer_kind(run).has_setting(setting),
    )


def ignore_unless_schedule_uses(setting: str) -> field_facts.IgnoredCases:
    """Make a setting idle with schedules of the learning rate that do not read it."""
    return field_facts.ignore_when(
        f"without --lr_scheduler {lr_schedules.format_schedules(setting)}",
        lambda run: not lr_schedules.is_schedule_setting(run, setting),
    )


NO_GAIN_NOTE = "no gain was shown on three sample subjects"
"""Result of the studies in `docs/studies.md`."""
EDM_REASON = "EDM weighs noise levels itself"
"""Reason why EDM training excludes other weightings."""
TRACKERS = (
    "tensorboard",
    "wandb",
    "comet_ml",
    "trackio",
    "aim",
    "mlflow",
    "clearml",
    "dvclive",
    "swanlab",
)
"""Choices of `--report_to`; each but tensorboard is a package of its own name."""

# Makers of each group's rows. The help and `docs/settings.md` list the groups in this order.
base_field = field_facts.build_field_maker("base model")
photos_field = field_facts.build_field_maker("photos")
prior_field = field_facts.build_field_maker("prior preservation")
adapter_field = field_facts.build_field_maker("adapter")
training_field = field_facts.build_field_maker("training")
optimizer_field = field_facts.build_field_maker("optimizer")
memory_field = field_facts.build_field_maker("memory and speed")
samples_field = field_facts.build_field_maker("samples and evaluation")
run_field = field_facts.build_field_maker("run folder")
hub_field = field_facts.build_field_maker("hub")


@dataclass(frozen=True, init=False)
class TrainConfig:
    """Settings of a run. Values are converted as those of the command line (`rank="16"` is 16) and
    checked on construction.

    UserError names the wrong setting and the reason. None means "not set" where it is allowed.
    Lengths ending in `_steps` count optimizer steps; sizes are px. `base` is a short name of
    `pretrained_model_name_or_path`.
    """

    # The base model, and where its files are.
    pretrained_model_name_or_path: str = base_field(
        default="toy",
        help=(
            "base model: a diffusers folder, a hub id, a .safetensors file, or an embedded one, "
            '"toy" or "toy-zimage"'
        ),
        required=True,
        path=expanduser,
        flag="base",
    )
    pretrained_vae_model_name_or_path: str | None = base_field(
        default=None,
        help="another VAE than the base's own: folder or hub id",
        path=expanduser,
    )
    revision: str | None = base_field(
        default=None,
        help="branch, tag or commit of the base on the hub",
    )
    variant: str | None = base_field(
        default=None,
        help='which files of the base to load, for example "fp16"',
    )
    cache_dir: str | None = base_field(
        default=None,
        help=(
            "where downloads, and encodings with --caching disk, are kept (default: the hub's "
            "cache, and ~/.cache/dreambooth_moslora)"
        ),
        path=expanduser,
        per_process=True,
    )

    # The photos of the subject: their files, captions, crops and masks.
    instance_data_dir: str | None = photos_field(
        default=None,
        help="folder with the photos of the subject",
        path=find_asset,
        per_subject=True,
    )
    leave_out: tuple[field_facts.Prompt, ...] = photos_field(
        default=(),
        help="file names of photos to leave out",
        yields_to=(field_facts.COMMAND_WORDS,),
    )
    instance_prompt: str = photos_field(
        default="a photo of sks object",
        help='the subject in words, with its rare token: "a photo of sks dog"',
        required=True,
        per_subject=True,
    )
    subjects: tuple[field_facts.Subject, ...] = photos_field(
        default=(),
        help=(
            "several subjects in one run: a folder with a folder of each (`sks dog`), or in TOML "
            "tables"
        ),
        yields_to=("instance_data_dir", field_facts.COMMAND_WORDS),
    )
    token: str | None = photos_field(
        default=None,
        help="the rare word in the instance prompt (default: found in it)",
        per_subject=True,
    )
    class_word: str | None = photos_field(
        default=None,
        help="the kind of thing it is (default: found in the prompts)",
        per_subject=True,
    )
    subject: str = photos_field(
        default="thing",
        help="what it is: "
        + "; ".join(
            f"a {word} {kind.summary}" for word, kind in subject_kinds.SUBJECT_KINDS.items()
        ),
        choices=tuple(subject_kinds.SUBJECT_KINDS),
        publish="if_changed",
        per_subject=True,
        yields_to=("subjects",),
    )
    describe: tuple[str, ...] = photos_field(
        default=(),
        help=(
            "what made captions say of the subject, such as hair or clothes: what is said is not "
            f"learnt; of a person the others of {', '.join(subject_kinds.TRAITS)} are left out"
        ),
        idle=field_facts.ignore_unless(captions="auto"),
    )
    caption_prefix: str | None = photos_field(
        default=None,
        help="words before each photo's own captions; the instance prompt stays",
        per_subject=True,
        yields_to=(field_facts.COMMAND_WORDS,),
    )
    captions: str = photos_field(
        default="given",
        help=(
            "given: those beside the photos; auto: photos without one get one made before "
            f"training, in the run folder ({NO_GAIN_NOTE})"
        ),
        choices=("given", "auto"),
        publish="if_changed",
    )
    caption_model: str | None = photos_field(
        default=None,
        help=(
            "vision-language model that makes captions: hub id or folder (default: "
            "Qwen/Qwen3-VL-2B-Instruct; the toy's own CLIP)"
        ),
        idle=field_facts.ignore_unless(captions="auto"),
    )
    shuffle_caption: bool = photos_field(
        default=False,
        help="show the tags of a caption, between commas, in changing orders",
        publish="always",
    )
    keep_tokens: int = photos_field(
        default=0,
        help="tags at a caption's start that --shuffle_caption leaves in place",
        low=0,
        publish="always",
        idle=field_facts.ignore_unless(shuffle_caption=True),
    )
    caption_dropout: float = photos_field(
        default=0.0,
        help="share of exposures with an empty caption, of photos and not of class images",
        low=0,
        high=1,
        publish="always",
    )
    instance_prompt_share: float | None = photos_field(
        default=None,
        help=(
            "share of exposures with the instance prompt, of photos whose captions lack it "
            "(default: 1/4)"
        ),
        low=0,
        high=1,
        publish="if_changed",
    )
    repeats: int = photos_field(
        default=1,
        help="how often an epoch shows each photo",
        low=1,
        high=10**6,
        publish="always",
    )
    resolution: int = photos_field(
        default=1024,
        help=(
            "side of the square crops, px, a multiple of 8; without it a smaller base takes its own"
        ),
        low=8,
        publish="always",
    )
    more_resolutions: tuple[str, ...] = photos_field(
        default=(),
        help="further sides of the crops, px: an epoch shows each photo once in each",
        publish="if_changed",
    )
    enable_bucket: bool = photos_field(
        default=False,
        help=(
            "crop each photo to a rectangle of its own shape and of the square's area, instead "
            "of to the square"
        ),
        publish="always",
        also="use_aspect_ratio_buckets",
    )
    bucket_reso_steps: int | None = photos_field(
        default=None,
        help=(
            "sides of such rectangles are multiples of this, px (default: 64; 8 up to a "
            "resolution of 256)"
        ),
        low=8,
        publish="always",
        idle=field_facts.ignore_unless(enable_bucket=True),
    )
    center_crop: bool = photos_field(
        default=False,
        help="crop the middle of each photo instead of a random place",
        publish="always",
    )
    random_flip: bool = photos_field(
        default=False,
        help=(
            "mirror crops at random; a crop that is kept is changed once for all "
            "(--crops_per_photo, --caching off)"
        ),
        publish="always",
    )
    crops_per_photo: int = photos_field(
        default=1,
        help="different crops taken of each photo",
        low=1,
        high=1000,
        publish="always",
        idle=field_facts.ignore_when(
            "with --caching off, which always takes new crops", lambda run: run.caching == "off"
        ),
    )
    crop_zoom: float = photos_field(
        default=1.0,
        help="enlarge each crop by a random factor up to this; 1: crops are as wide as the photo",
        low=1,
        high=4,
        publish="always",
    )
    unmasked_weight: float = photos_field(
        default=0.2,
        help=(
            "loss weight of the parts that a mask (name.mask.png) leaves out; it is always 0 for "
            "transparent parts"
        ),
        low=0,
        high=1,
        publish="always",
    )
    synthetic_weight: float = photos_field(
        default=0.5,
        help="loss weight of photos that `enlarge` has made, beside 1 of the others",
        low=0,
        high=1,
        publish="if_changed",
    )
    masks: str = photos_field(
        default="given",
        help="given: those beside the photos; auto: made before training for photos without one",
        choices=("given", "auto"),
        publish="always",
    )
    mask_model: str | None = photos_field(
        default=None,
        help=(
            "CLIPSeg that makes masks: hub id or folder (default: CIDAS/clipseg-rd64-refined; "
            "the toy's own net)"
        ),
        idle=field_facts.ignore_unless(masks="auto"),
    )
    mask_prompt: str | None = photos_field(
        default=None,
        help="what CLIPSeg looks for in the photos (default: the class word)",
        per_subject=True,
        idle=field_facts.ignore_unless(masks="auto"),
    )

    # Prior preservation, which keeps the base's idea of the class beside the subject.
    with_prior_preservation: bool = prior_field(
        default=False,
        help="preserve what the base knows of the class",
        publish="always",
    )
    prior: str = prior_field(
        default="class_images",
        help=(
            "class_images: train on pictures of the class; adapter_off: on the frozen base's own "
            "answer, no pictures"
        ),
        choices=("class_images", "adapter_off"),
        publish="always",
        idle=field_facts.ignore_unless(with_prior_preservation=True),
    )
    class_prompt: str | None = prior_field(
        default=None,
        help='the class in words: "a photo of a dog"',
        per_subject=True,
        idle=field_facts.ignore_unless(with_prior_preservation=True),
    )
    prior_prompts: tuple[field_facts.Prompt, ...] = prior_field(
        default=(),
        help=(
            "other prompts that adapter_off preserves too: about half of the images draw one of "
            "them"
        ),
        idle=field_facts.ignore_unless(with_prior_preservation=True, prior="adapter_off"),
    )
    class_data_dir: str | None = prior_field(
        default=None,
        help="folder with class images (default: in the run folder)",
        path=expanduser,
        per_subject=True,
        idle=(
            field_facts.ignore_unless(with_prior_preservation=True)
            + field_facts.ignore_when(
                "with --prior adapter_off, which needs no images",
                lambda run: run.with_prior_preservation and run.prior == "adapter_off",
            )
        ),
    )
    num_class_images: int = prior_field(
        default=100,
        help="class images wanted; missing ones are generated",
        low=1,
        publish="always",
        idle=field_facts.ignore_unless(with_prior_preservation=True, prior="class_images"),
    )
    prior_loss_weight: float = prior_field(
        default=1.0,
        help="weight of the prior loss",
        low=0,
        publish="always",
        idle=field_facts.ignore_unless(with_prior_preservation=True),
    )
    sample_batch_size: int = prior_field(
        default=4,
        help="images generated at once",
        low=1,
        high=4096,
        publish="if_changed",
        idle=field_facts.ignore_unless(with_prior_preservation=True, prior="class_images"),
    )

    # The adapter: its size, its mixer, and the layers that get it.
    rank: int = adapter_field(
        default=4,
        help="rank r of the adapter",
        low=1,
        high=4096,
        publish="always",
    )
    lora_alpha: float | None = adapter_field(
        default=None,
        help="the adapter is scaled by alpha / rank (default: alpha = rank, of each layer)",
        above=0,
        publish="always",
    )
    rank_pattern: tuple[str, ...] = adapter_field(
        default=(),
        help=(
            "other ranks of some layers (not of text encoders), as NAME=N: to_k=8, "
            "down_blocks.2.*=16; the first match counts"
        ),
        publish="always",
    )
    alpha_pattern: tuple[str, ...] = adapter_field(
        default=(),
        help="other alphas of some layers, in the same form",
        publish="always",
    )
    use_rslora: bool = adapter_field(
        default=False,
        help="scale by alpha / sqrt(rank)",
        publish="always",
        same_on_resume=True,
    )
    lora_dropout: float = adapter_field(
        default=0.0,
        help="dropout in front of the adapter",
        low=0,
        high=0.99,
        publish="always",
        same_on_resume=True,
    )
    use_dora: bool = adapter_field(
        default=False,
        help="learn the weights' magnitudes too (DoRA)",
        publish="always",
        same_on_resume=True,
    )
    mixer: str = adapter_field(
        default="orthogonal",
        help="start of the r x r mixer; none is plain LoRA",
        choices=MIXERS,
        publish="always",
        same_on_resume=True,
    )
    train_mixer: bool = adapter_field(
        default=True,
        help="learn the mixer",
        publish="always",
        same_on_resume=True,
    )
    mixer_lr_scale: float = adapter_field(
        default=1.0,
        help="the mixer's learning rate, as a multiple of the others'",
        low=0,
        publish="always",
        idle=(
            field_facts.ignore_when("with --mixer none", lambda run: run.mixer == "none")
            + field_facts.ignore_when(
                "with --no_train_mixer", lambda run: run.mixer != "none" and not run.train_mixer
            )
        ),
    )
    target_modules: tuple[str, ...] = adapter_field(
        default=field_facts.ATTENTION_LAYERS,
        help=(
            "layers of the UNet or transformer that get an adapter, by the end of their path "
            "(to_q, conv1), with * (down_blocks.2.*), or a block whose attention is meant "
            "(up_blocks.0.attentions.1, mid_block, blora_content, blora_style)"
        ),
        publish="always",
        also="lora_layers",
    )
    lora_blocks: tuple[str, ...] = adapter_field(
        default=(),
        help=(
            "only these blocks of a transformer get an adapter: their numbers in "
            "transformer_blocks, such as 0,1,5"
        ),
        family="flow",
    )
    train_text_encoder: bool = adapter_field(
        default=False,
        help="put adapters on the CLIP text encoders too, of SDXL, SD 1.5, SD 3.5 and FLUX.1",
        publish="always",
    )
    init_adapter: str | None = adapter_field(
        default=None,
        help="begin with an existing adapter: a LoRA file of any program and rank, or a run folder",
        path=find_asset,
    )
    companion: str | None = adapter_field(
        default=None,
        help=(
            "a LoRA file that lies under the adapter in training and samples and is no part of "
            "what is published, such as one that undoes a base's distillation"
        ),
        path=find_asset,
    )

    # The training: steps, rates, and the loss.
    seed: int | None = training_field(
        default=None,
        help="seed of everything random",
        low=0,
        high=2**63 - 1,
        publish="always",
    )
    train_batch_size: int = training_field(
        default=4,
        help="photos in one forward pass on each device",
        low=1,
        high=4096,
        publish="always",
    )
    gradient_accumulation_steps: int = training_field(
        default=1,
        help="forward passes in one step",
        low=1,
        publish="always",
    )
    num_train_epochs: int = training_field(
        default=1,
        help="times through all photos, when --max_train_steps is not given",
        low=1,
        publish="always",
        idle=field_facts.ignore_when(
            "with --max_train_steps or --exposures_per_photo",
            lambda run: run.max_train_steps or run.exposures_per_photo,
        ),
    )
    max_train_steps: int | None = training_field(
        default=None,
        help="optimizer steps; overrides --num_train_epochs",
        low=1,
        yields_to=("exposures_per_photo", "num_train_epochs"),
        publish="always",
    )
    exposures_per_photo: int | None = training_field(
        default=None,
        help="instead of --max_train_steps: how often the run shows each photo",
        low=1,
        yields_to=("max_train_steps", "num_train_epochs"),
        excludes={"max_train_steps": "each sets the steps"},
        publish="always",
    )
    learning_rate: float = training_field(
        default=1e-4,
        help="learning rate; 1.0 with Prodigy",
        low=0,
        high=100,
        publish="always",
    )
    text_encoder_lr: float = training_field(
        default=5e-6,
        help="learning rate of the text encoders; 0: the same as --learning_rate",
        low=0,
        high=100,
        publish="always",
        idle=(
            field_facts.ignore_unless(train_text_encoder=True)
            + field_facts.ignore_when(
                "with --optimizer {optimizer}, which takes one learning rate for all",
                lambda run: run.train_text_encoder and optimizers.get_optimizer_kind(run).one_rate,
            )
        ),
    )
    scale_lr: bool = training_field(
        default=False,
        help="multiply --learning_rate by processes x accumulation x batch size",
        publish="always",
    )
    lr_scheduler: str = training_field(
        default="constant",
        help="schedule of the learning rate",
        choices=lr_schedules.LR_SCHEDULES,
        publish="always",
    )
    lr_warmup_steps: int = training_field(
        default=500,
        help="steps of warm-up, where the schedule has one",
        low=0,
        publish="always",
        idle=field_facts.ignore_when(
            "with --lr_scheduler {lr_scheduler}",
            lambda run: (
                run.lr_warmup_steps and not lr_schedules.is_schedule_setting(run, "lr_warmup_steps")
            ),
        ),
    )
    lr_num_cycles: int = training_field(
        default=1,
        help="restarts of cosine_with_restarts",
        low=1,
        publish="always",
        idle=ignore_unless_schedule_uses("lr_num_cycles"),
    )
    lr_power: float = training_field(
        default=1.0,
        help="power of the polynomial schedule",
        above=0,
        publish="always",
        idle=ignore_unless_schedule_uses("lr_power"),
    )
    snr_gamma: float | None = training_field(
        default=None,
        help=f"min-SNR weighting of the loss; 5.0 is usual; {NO_GAIN_NOTE}",
        above=0,
        publish="always",
        yields_to=("debiased_estimation_loss", "do_edm_style_training"),
        family="unet",
        excludes={
            "do_edm_style_training": EDM_REASON,
            "debiased_estimation_loss": "each weighs noise levels",
        },
    )
    debiased_estimation_loss: bool = training_field(
        default=False,
        help=f"weigh errors by 1/sqrt(SNR), instead of --snr_gamma; {NO_GAIN_NOTE}",
        publish="if_changed",
        family="unet",
        excludes={"do_edm_style_training": EDM_REASON},
    )
    noise_offset: float = training_field(
        default=0.0,
        help=(
            "shift the noise of each channel as a whole by draws of this deviation, for very "
            f"dark or bright pictures; {NO_GAIN_NOTE}"
        ),
        low=0,
        high=1,
        publish="if_changed",
        family="unet",
    )
    do_edm_style_training: bool = training_field(
        default=False,
        help="EDM preconditioning of the loss (arXiv 2206.00364)",
        publish="always",
        family="unet",
    )
    weighting_scheme: str | None = training_field(
        default=None,
        help=(
            "flow models: which noise levels are drawn, or how they are weighed (default: as in "
            "diffusers' script)"
        ),
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
        publish="if_changed",
        family="flow",
    )
    logit_mean: float = training_field(
        default=0.0,
        help="mean of logit_normal",
        low=-10,
        high=10,
        publish="if_changed",
        idle=field_facts.ignore_unless(weighting_scheme="logit_normal"),
    )
    logit_std: float = training_field(
        default=1.0,
        help="standard deviation of logit_normal",
        above=0,
        high=10,
        publish="if_changed",
        idle=field_facts.ignore_unless(weighting_scheme="logit_normal"),
    )
    mode_scale: float = training_field(
        default=1.29,
        help="scale of mode",
        low=-1,
        high=1.75,
        publish="if_changed",
        idle=field_facts.ignore_unless(weighting_scheme="mode"),
    )
    precondition_outputs: bool | None = training_field(
        default=None,
        help=(
            "flow models: errors are those of the clean latents, which weighs noisy levels more "
            "(default: as in diffusers' script)"
        ),
        publish="if_changed",
        family="flow",
    )
    shift_timesteps: bool = training_field(
        default=False,
        help=(
            "flow models: draw noisier levels for larger pictures, by the line in the base's "
            "scheduler"
        ),
        publish="if_changed",
        family="flow",
    )
    flow_shift: float | None = training_field(
        default=None,
        help=(
            "flow models: shift the noise levels that are drawn by this factor, in place of the "
            "base's scheduler; 1 shifts none (default: as the scheduler does)"
        ),
        above=0,
        high=100,
        publish="if_changed",
        family="flow",
        excludes={"shift_timesteps": "each shifts noise levels"},
    )
    guidance_scale: float = training_field(
        default=3.5,
        help="what a base with embedded guidance (FLUX.1 dev) is told in training",
        low=0,
        high=100,
        publish="if_changed",
    )
    max_sequence_length: int | None = training_field(
        default=None,
        help="most tokens of a prompt, for bases with a long text encoder",
        low=1,
        high=2048,
        publish="if_changed",
    )
    text_encoder_out_layers: tuple[str, ...] = training_field(
        default=(),
        help="numbers of the text encoder's layers that FLUX.2 reads (default: its own)",
        publish="if_changed",
    )
    clip_skip: int | None = training_field(
        default=None,
        help=(
            "which layer of Stable Diffusion 1.5's text encoder is read, counted from the last, as "
            "many anime bases want 2 (default: 1, the last)"
        ),
        low=1,
        high=12,
        publish="if_changed",
    )
    max_grad_norm: float = training_field(
        default=1.0,
        help="gradients are clipped to this norm",
        above=0,
        publish="always",
    )

    # The optimizer. A row is idle with the kinds that do not read it.
    optimizer: str = optimizer_field(
        default="AdamW",
        help=", ".join(f"{name} {kind.summary}" for name, kind in optimizers.OPTIMIZERS.items()),
        choices=optimizers.OPTIMIZERS,
        publish="always",
        packages={
            name: kind.package for name, kind in optimizers.OPTIMIZERS.items() if kind.package
        },
        spellings=(
            {name.lower(): name for name in optimizers.OPTIMIZERS}
            | {"schedulefree": optimizers.SCHEDULE_FREE}
        ),
    )
    use_8bit_adam: bool = optimizer_field(
        default=False,
        help="AdamW with 8-bit states (bitsandbytes)",
        publish="always",
        packages={True: "bitsandbytes"},
        idle=field_facts.ignore_when(
            "with --optimizer {optimizer}",
            lambda run: not optimizers.OPTIMIZERS[run.optimizer].in_8_bit,
        ),
    )
    adam_beta1: float = optimizer_field(
        default=0.9,
        help=f"beta1 of {optimizers.format_optimizers('adam_beta1')}",
        low=0,
        below=1,
        publish="always",
        idle=ignore_unless_optimizer_uses("adam_beta1"),
    )
    adam_beta2: float = optimizer_field(
        default=0.999,
        help=f"beta2 of {optimizers.format_optimizers('adam_beta2')}",
        low=0,
        below=1,
        publish="always",
        idle=ignore_unless_optimizer_uses("adam_beta2"),
    )
    adam_epsilon: float = optimizer_field(
        default=1e-8,
        help=f"epsilon of {optimizers.format_optimizers('adam_epsilon')}",
        above=0,
        publish="always",
        idle=ignore_unless_optimizer_uses("adam_epsilon"),
    )
    adam_weight_decay: float = optimizer_field(
        default=1e-4,
        help="weight decay of the adapter on the UNet or transformer",
        low=0,
        publish="always",
    )
    adam_weight_decay_text_encoder: float = optimizer_field(
        default=1e-3,
        help="weight decay of the text encoders' adapters",
        low=0,
        publish="always",
    )
    prodigy_beta3: float | None = optimizer_field(
        default=None,
        help="Prodigy: coefficient of its step size",
        low=0,
        high=1,
        publish="always",
        idle=ignore_unless_optimizer_uses("prodigy_beta3"),
    )
    prodigy_decouple: bool = optimizer_field(
        default=True,
        help="Prodigy: AdamW-style weight decay",
        publish="always",
        idle=ignore_unless_optimizer_uses("prodigy_decouple"),
    )
    prodigy_use_bias_correction: bool = optimizer_field(
        default=True,
        help="Prodigy: bias correction",
        publish="always",
        idle=ignore_unless_optimizer_uses("prodigy_use_bias_correction"),
    )
    prodigy_safeguard_warmup: bool = optimizer_field(
        default=True,
        help="Prodigy: no lr in the denominator of D, for warm-ups",
        publish="always",
        idle=ignore_unless_optimizer_uses("prodigy_safeguard_warmup"),
    )

    # Memory and speed. Most of these change a result only by rounding.
    memory: str | None = memory_field(
        default=None,
        help="a plan to save memory, fastest first; auto: what fits",
        choices=("auto", *MEMORY_PLANS),
        replaces=("mixed_precision", *MEMORY_PLAN_SETTINGS),
    )
    mixed_precision: str | None = memory_field(
        default=None,
        help="precision of the frozen base (default: what `accelerate config` says)",
        choices=("no", "fp16", "bf16"),
        publish="always",
    )
    base_quantization: str = memory_field(
        default="none",
        help="keep the frozen UNet or transformer in 4 or 8 bit",
        choices=("none", "nf4", "int8"),
        publish="always",
        packages={"nf4": "bitsandbytes"},
        yields_to=("memory",),
    )
    gradient_checkpointing: bool = memory_field(
        default=False,
        help="less memory, slower steps: recompute activations",
        publish="always",
        yields_to=("memory",),
    )
    recompute_feed_forward: bool = memory_field(
        default=False,
        help=(
            "recompute the activations of the UNet's feed-forward blocks alone: two fifths less, "
            "for an eighth more work"
        ),
        publish="if_changed",
        family="unet",
        yields_to=("memory",),
        idle=field_facts.ignore_when(
            "with --gradient_checkpointing, which recomputes all",
            lambda run: run.gradient_checkpointing,
        ),
    )
    stream_blocks: bool = memory_field(
        default=False,
        help=(
            "keep the blocks of the UNet or transformer in the host's memory: each is copied to "
            "the GPU while the one before it computes"
        ),
        publish="if_changed",
        excludes={"use_dora": "DoRA reads the weights"},
        yields_to=("memory",),
    )
    images_at_once: int | None = memory_field(
        default=None,
        help=(
            "most images that pass through the UNet together, of one or of several "
            "micro-batches; gradients are the same but for rounding (default: a micro-batch with "
            "its prior)"
        ),
        low=1,
        publish="if_changed",
        excludes={"train_text_encoder": "a text's gradient comes from one pass"},
        yields_to=("memory",),
    )
    caching: str = memory_field(
        default="memory",
        help="keep encoded photos in memory, on disk for later runs, or encode each step",
        choices=("memory", "disk", "off"),
        publish="if_changed",
    )
    cache_latents: bool = memory_field(
        default=False,
        help="accepted: photos are always encoded once, unless --caching off",
    )
    offload: bool = memory_field(
        default=False,
        help="accepted: encoders and VAE always leave the GPU when they are not used",
    )
    allow_tf32: bool = memory_field(
        default=False,
        help="faster, less exact fp32 products on Nvidia GPUs",
        publish="if_changed",
    )
    compile: str = memory_field(
        default="auto",
        help=(
            "compile the transformer blocks (torch.compile): auto on a GPU where the run is long "
            "enough"
        ),
        choices=("auto", "on", "off"),
        publish="if_changed",
    )
    deterministic: bool = memory_field(
        default=False,
        help=(
            "the same bytes each time on a GPU too, as on a CPU: slower attention, no search of "
            "algorithms"
        ),
        publish="if_changed",
    )
    enable_xformers_memory_efficient_attention: bool = memory_field(
        default=False,
        help="accepted: PyTorch's own attention is used",
    )

    # Samples and scores during the run.
    validation_prompt: tuple[field_facts.Prompt, ...] | None = samples_field(
        default=None,
        help="prompts of the sample images, each in quotes (default: the instance prompt)",
        per_subject=True,
    )
    num_validation_images: int | None = samples_field(
        default=None,
        help="sample images each time (default: 4)",
        low=0,
        high=1000,
    )
    validation_epochs: int = samples_field(
        default=50,
        help="epochs between samples",
        low=1,
    )
    validation_steps: int | None = samples_field(
        default=None,
        help="steps between samples; overrides --validation_epochs",
        low=1,
    )
    evaluate_steps: int | None = samples_field(
        default=None,
        help="steps between scores of fidelity; 0: never (default: never)",
        low=0,
    )

    # The run folder: its files, and how often they are written.
    output_dir: str = run_field(
        default="lora-dreambooth-model",
        help="the run folder",
        path=expanduser,
        yields_to=(field_facts.COMMAND_WORDS,),
    )
    checkpointing_steps: int = run_field(
        default=500,
        help="steps between checkpoints",
        low=1,
    )
    checkpoints_total_limit: int | None = run_field(
        default=None,
        help="numbered checkpoints to keep",
        low=1,
    )
    resume_from_checkpoint: str | None = run_field(
        default=None,
        help='a checkpoint folder, or "latest"',
        path=expanduser,
    )
    logging_dir: str = run_field(
        default="logs",
        help="folder of the trackers' logs inside the run folder",
        path=expanduser,
    )
    report_to: str = run_field(
        default="tensorboard",
        help="tracker for numbers and samples",
        choices=(*TRACKERS, "all", "none"),
        packages={name: name for name in TRACKERS if name != "tensorboard"},
    )
    dry_run: bool = run_field(
        default=False,
        help="print the plan and its cost, and exit",
    )

    # The upload, which is off by default.
    push_to_hub: bool = hub_field(
        default=False,
        help="upload the adapter and its card when done; never the photos",
    )
    hub_token: str | None = hub_field(
        default=None,
        help="token for the upload (default: that of `hf auth login`)",
        secret=True,
    )
    hub_model_id: str | None = hub_field(
        default=None,
        help="repository to upload to (default: the run folder's name)",
        yields_to=(field_facts.COMMAND_WORDS,),
    )

    def __init__(self, **settings: "Unpack[TrainSettings]") -> None:
        with name_arguments_in_errors():
            self._convert(settings)

    def _convert(self, settings: Mapping[str, Any]) -> None:
        """Fill all fields. Raises UserError."""
        values = {name: item.default for name, item in SETTINGS.items()} | parse_settings(settings)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        rules.check_combinations(self)

    @property
    def base(self) -> str:
        """Base model, `pretrained_model_name_or_path`."""
        return self.pretrained_model_name_or_path

    @cached_property
    def each_subject(self) -> tuple["TrainConfig", ...]:
        """Settings of 1 to n runs, each with one of the run's subjects alone."""
        if not self.subjects:
            return (self,)
        return tuple(map(self.build_subject_config, self.subjects))

    def build_subject_config(self, table: "SubjectTable") -> "TrainConfig":
        """Return the settings with this subject alone. Raises UserError."""
        shared = {name: getattr(self, name) for name in SETTINGS} | {"subjects": ()}
        return TrainConfig.from_dict(shared | table.to_dict())

    @property
    def cache_folder(self) -> Path:
        """Folder of encodings for all runs: `--cache_dir`, else in `$XDG_CACHE_HOME` or
        `~/.cache`."""
        if self.cache_dir:
            return Path(self.cache_dir)
        caches = Path(os.environ.get("XDG_CACHE_HOME") or expanduser("~/.cache"))
        return caches / "dreambooth_moslora"

    @property
    def output_folders(self) -> dict[str, Path]:
        """Folders that the run writes to, except class images, by the settings that name them."""
        folders = {"output_dir": Path(self.output_dir)}
        if self.caching == "disk":
            folders["cache_dir"] = self.cache_folder
        return folders

    @property
    def uses_class_images(self) -> bool:
        return self.with_prior_preservation and self.prior == "class_images"

    @property
    def is_scored(self) -> bool:
        return bool(self.evaluate_steps)

    @property
    def images_per_micro_batch(self) -> int:
        """Photos and their prior images of one micro-batch."""
        return self.train_batch_size * (2 if self.with_prior_preservation else 1)

    @property
    def images_per_pass(self) -> int:
        """Most images that pass through the denoiser together.

        They are whole micro-batches, or a part of one, which has photos alone or prior images
        alone.
        """
        per_micro_batch = self.images_per_micro_batch
        limit = self.images_at_once or per_micro_batch
        if limit < per_micro_batch:
            return min(limit, self.train_batch_size)
        return min(limit // per_micro_batch, self.gradient_accumulation_steps) * per_micro_batch

    @property
    def bare_prompt_share(self) -> float:
        """Share of exposures with the instance prompt, of photos whose captions lack it."""
        return 1 / 4 if self.instance_prompt_share is None else self.instance_prompt_share

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the square crops, px, the largest first."""
        return (self.resolution, *map(int, self.more_resolutions))

    @property
    def has_buckets(self) -> bool:
        """Whether crops have several sizes, so that a batch must choose one."""
        return self.enable_bucket or bool(self.more_resolutions)

    @property
    def sample_count(self) -> int:
        """Number of sample images each time."""
        return 4 if self.num_validation_images is None else self.num_validation_images

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Build the settings from values of a file or of flags.

        Raises UserError, which names flags, for an unknown name with the most similar setting.
        """
        config = cls.__new__(cls)
        config._convert(values)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values of all settings but the secret ones, for `from_dict`."""
        values = {name: getattr(self, name) for name in list_settings("secret", False)}
        # JSON has lists and tables in place of tuples and subjects.
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        subject_tables = [subject.to_dict() for subject in self.subjects]
        return values | lists | {"subjects": subject_tables}


FieldType = tuple[Any, bool]
"""(type, whether None is allowed): tuple for names, Prompt or Subject for a tuple of them."""


def get_field_types(owner: type) -> dict[str, FieldType]:
    """Return the type of each setting, by its annotation."""
    types = {}
    for name, hint in get_type_hints(owner).items():
        # `int | None` may be None; `int` may not.
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kind = next(k for k in kinds if k is not type(None))
        # The items of a tuple decide: text for a `tuple[Prompt, ...]` is not split at commas.
        if kind not in (bool, int, float, str):
            item = get_args(kind)[0]
            kind = tuple if item is str else item
        types[name] = kind, type(None) in kinds
    return types


SETTINGS: dict[str, Field] = {item.name: item for item in fields(TrainConfig)}
FIELD_TYPES = get_field_types(TrainConfig)
GROUPS = tuple(dict.fromkeys(item.metadata["group"] for item in SETTINGS.values()))
"""The groups of the help, in their order."""
EXCLUSIONS = {name: item.metadata["excludes"] for name, item in SETTINGS.items()}
"""Setting -> settings that cannot be combined with it, and why."""


def list_settings(fact: str, value: Any = True) -> tuple[str, ...]:
    """Return the settings whose row has this value of a fact of `field_facts.FieldFacts`."""
    return tuple(name for name, item in SETTINGS.items() if item.metadata[fact] == value)


ALIASES = {
    alias: name
    for name, item in SETTINGS.items()
    for alias in f"{item.metadata['flag']} {item.metadata['also']}".split()
}
"""Further names of a setting, as a flag and in a file -> its name."""


GUESSES = {
    "steps": "max_train_steps",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "model": "pretrained_model_name_or_path",
    "prompt": "instance_prompt",
    "lora_rank": "rank",
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
}
"""Names that people try first -> the setting that they mean."""
FLAG_PATTERN = re.compile(r"--(?P<name>\w+)(?: (?P<word>'[^']*'|[^\s,;:]+?)(?=\.?(?:[\s,;:]|$)))?")
"""Flag in a message, with the word after it."""


def list_flags(name: str) -> list[str]:
    """Return the flags of a setting, the preferred one first."""
    facts = SETTINGS[name].metadata
    names = [*facts["flag"].split(), name, *facts["also"].split()]
    return [f"--{alias}" for alias in names]


def get_flag_name(name: str) -> str:
    """Return a setting's preferred flag without hyphens; any other name is returned unchanged."""
    return SETTINGS[name].metadata["flag"] or name if name in SETTINGS else name


def get_set_values(table: Any) -> dict[str, str]:
    """Return the settings that a subject's table sets."""
    return {name: value for name, value in vars(table).items() if value is not None}


SubjectTable = make_dataclass(
    "SubjectTable",
    [(name, str | None, None) for name in list_settings("per_subject")],
    frozen=True,
    namespace={
        "__doc__": "Settings in which a subject differs from the run; None for the others.",
        "__module__": __name__,
        "to_dict": get_set_values,
    },
)


def build_subject_table(values: Any) -> Any:
    """Return a `SubjectTable` of the settings. Raises UserError for an unknown one."""
    if isinstance(values, SubjectTable):
        return values
    names = list_settings("per_subject")
    unknown = sorted(map(str, values.keys() - set(names)))
    if unknown:
        raise UserError(
            f"--subjects: a subject has no setting `{unknown[0]}`; it may have {', '.join(names)}."
        )
    return SubjectTable(**values)


def parse_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of any source by their names, each converted to its type.

    Files, flags, forms, lists and keyword arguments pass through here, and converted values pass
    unchanged. Raises UserError for an unknown name, with the most similar setting, and for a value
    of another type or beyond its limits.
    """
    values = replace_base_name(settings)
    check_setting_names(values)
    return {name: parse_setting(name, value) for name, value in values.items()}


def parse_setting(name: str, value: Any) -> Any:
    """Return the value in the setting's type, within its limits. Raises UserError."""
    item = SETTINGS[name]
    facts = item.metadata
    base, is_optional = FIELD_TYPES[name]
    if value is None and is_optional:
        return None

    # Convert the type: a flag is text, JSON and TOML have numbers.
    parsed = convert_value(base, value)
    if parsed is None:
        raise UserError(f"--{name} {value!r:.60}: expected {TYPE_DESCRIPTIONS[base]}.")
    parsed = facts["spellings"].get(str(parsed).lower(), parsed)

    # Check the limits, unless it is the default.
    if parsed != item.default:
        if facts["choices"] and parsed not in facts["choices"]:
            raise UserError(f"--{name} {parsed}: choose one of {', '.join(facts['choices'])}.")
        if is_number(parsed):
            check_number(name, parsed, facts)

    # Resolve the tables of subjects, or a path.
    if base is field_facts.Subject:
        return tuple(map(build_subject_table, parsed))
    return facts["path"](parsed) if parsed and facts["path"] else parsed


MAX_INTEGER = 10**9
"""Upper bound of integers without a bound of their own: larger ones are typing errors."""
BOOLEAN_WORDS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
"""Values of a switch in a file or in another program's header, in lower case."""
TYPE_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of names, separated by commas",
    field_facts.Prompt: "a list of prompts",
    field_facts.Subject: "a folder of folders, or [[subjects]] tables",
}
"""Type -> its name in a message."""


def convert_value(base: Any, value: Any) -> Any:
    """Return the value in the type; None if it cannot be converted.

    Raises UserError for tables of subjects that cannot be read.
    """
    # Tables, switches and texts.
    if base is field_facts.Subject:
        return subjects.to_tables(value)
    if base is bool:
        if isinstance(value, bool):
            return value
        return BOOLEAN_WORDS.get(value.lower()) if isinstance(value, str) else None
    if base is str:
        return str(value) if isinstance(value, (str, Path)) else None
    # Numbers.
    if base in (int, float):
        try:
            number = None if isinstance(value, bool) else float(value)
        except OverflowError:  # a whole number of hundreds of digits, which `repr` may refuse
            return math.inf
        except (TypeError, ValueError):
            return None
        if base is float or number is None:
            return number
        return parse_integer(value, number)
    # Lists of texts; a single text is a list too.
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        return None
    # Names may be numbers, such as those of blocks.
    if base is tuple:
        texts = [str(text) if type(text) is int else text for text in texts]
    if any(convert_value(str, text) is None for text in texts):
        return None
    items = ",".join(texts).split(",") if base is tuple else texts
    return tuple(item.strip() for item in items if item.strip())


def parse_integer(value: Any, number: float) -> int | None:
    """Return a value near `number` as an integer, with all digits of a text; None for fractions."""
    if not number.is_integer():
        return None
    try:
        return int(value)
    except ValueError:  # 1e9
        return int(number)


BOUNDS = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
"""A row's bound -> comparison of a value with it, and its name in a message."""


def check_number(name: str, value: float, facts: Mapping[str, Any]) -> None:
    """Raise UserError for a number that is not finite or breaks a bound in the `facts` of its
    row."""
    if not math.isfinite(value):
        raise UserError(f"--{name} {value}: must be a finite number.")
    bounds = {kind: facts[kind] for kind in BOUNDS}
    if bounds["high"] is None and isinstance(value, int):
        bounds["high"] = MAX_INTEGER
    for kind, (is_within, description) in BOUNDS.items():
        bound = bounds[kind]
        if bound is not None and not is_within(value, bound):
            raise UserError(f"--{name} {value:g}: must be {description} {bound:g}.")


def replace_base_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with `base` under its own name. Raises UserError if both names are
    given."""
    values = dict(settings)
    base = values.pop("base", None)
    if base is not None and "pretrained_model_name_or_path" in values:
        raise UserError("base and pretrained_model_name_or_path: give one of them.")
    return values if base is None else values | {"pretrained_model_name_or_path": base}


def check_setting_names(names: Iterable[str]) -> None:
    """Raise UserError for an unknown name, with the most similar setting."""
    for name in names:
        if name not in SETTINGS:
            alias = name.replace("-", "_")
            nearest = (ALIASES | GUESSES).get(alias)
            nearest = nearest or field_facts.find_nearest_name(alias, SETTINGS)
            advice = f": did you mean `{nearest}`?" if nearest else "; docs/settings.md lists all."
            raise UserError(f"unknown setting `{name}`{advice}")


@contextmanager
def name_arguments_in_errors() -> Iterator[None]:
    """Let UserErrors name arguments of Python in place of flags."""
    try:
        yield
    except UserError as error:
        raise UserError(format_arguments(str(error))) from error.__cause__


def format_arguments(text: str) -> str:
    """Write flags as arguments: `--captions auto` -> `captions="auto"`."""
    text = re.sub(r"`train (\S+) (\w+)`", r'`train_subject("\1", "\2")`', text)
    return FLAG_PATTERN.sub(format_argument, text)


def format_argument(flag: re.Match) -> str:
    """Write a flag, with its value if the next word is one, as an argument."""
    name, word = flag["name"], flag["word"] or ""
    setting = ALIASES.get(name, name)
    if setting not in SETTINGS and name.removeprefix("no_") in SETTINGS:
        return f"{name.removeprefix('no_')}=False{word and f' {word}'}"
    if word.startswith("'") or re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|-?inf|nan", word):
        return f"{name}={word}"

    # A message may begin with any value and a colon: `--masks sometimes: choose one of …`.
    begins = flag.start() == 0 and flag.string[flag.end() :].startswith(":")
    is_choice = setting in SETTINGS and word in SETTINGS[setting].metadata["choices"]
    if word and (begins or is_choice):
        return f'{name}="{word}"'
    return f"{name} {word}".rstrip()


def get_rank_and_alpha(config: TrainConfig, component: str, path: str) -> tuple[int, float]:
    """Return rank and alpha of one layer; without an alpha, it equals the layer's rank.

    Patterns do not apply to text encoders.
    """
    rank = alpha = None
    if not component.startswith("text_encoder"):
        rank = field_facts.find_pattern_value(config.rank_pattern, "rank_pattern", path)
        alpha = field_facts.find_pattern_value(config.alpha_pattern, "alpha_pattern", path)
    rank = rank or config.rank
    alpha = alpha or config.lora_alpha or rank
    return int(rank), float(alpha)


def count_layer_parameters(config: TrainConfig, rank: int, width: int) -> int:
    """Return how many numbers of A, B and M one layer learns; `width` sums its inputs and
    outputs."""
    has_mixer = config.mixer != "none" and config.train_mixer
    return rank * width + (rank**2 if has_mixer else 0)


def check_rank(mixer: str, rank: int) -> None:
    """Raise UserError for a rank that the mixer's M cannot have."""
    if mixer == "butterfly" and rank % 2:
        raise UserError(f"mixer butterfly needs an even rank, not {rank}")
