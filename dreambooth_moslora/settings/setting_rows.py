"""Table of all settings of a training run: each is one row of `SettingRows`.

A row has the setting's name, type, default and help, and the facts of `field_facts.FieldFacts`:
bounds, choices, whether a published file contains it, when it has no effect, its names elsewhere.
The command line, the configuration files, the header of a published file, the remarks before a run
and the list in `docs/settings.md` are made from the rows. A rule between several settings is a
sentence in `rules`.
"""

from dataclasses import dataclass
from os.path import expanduser

from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.settings import (
    field_facts,
    lr_schedules,
    memory_presets,
    optimizers,
    subject_kinds,
)

MIXERS = ["orthogonal", "identity", "kaiming", "butterfly", "none"]
"""Initial values of the r x r matrix between A and B; `none` is a plain LoRA."""


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
class SettingRows:
    """Rows of the settings, in the groups of the help."""

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
        help="a plan to save memory, most exact weights first; auto: what fits",
        choices=("auto", *memory_presets.MEMORY_PLANS),
        replaces=("mixed_precision", *memory_presets.MEMORY_PLAN_SETTINGS),
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
    streamed_share: float = memory_field(
        default=1.0,
        help=(
            "share of the blocks that --stream_blocks streams, evenly spaced; the others stay on "
            "the GPU"
        ),
        above=0,
        high=1,
        publish="if_changed",
        yields_to=("memory",),
        idle=field_facts.ignore_unless(stream_blocks=True),
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
        help="steps between scores; 0: never (default: never; with PHOTOS WORD up to 4 times)",
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
