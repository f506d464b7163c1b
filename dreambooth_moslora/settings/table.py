"""All settings of a run in one frozen dataclass, and the rules between them.

Settings of the training material: the base model, the photos of the subject, and prior preservation of its class.

Settings of the adapter, its training and its optimizer.

Settings around the training: memory and speed, samples and scores, the run folder, and the hub.

Rules between settings: each is one sentence that names the contradicting flags.

All settings of a training run in one frozen dataclass: the flags of diffusers' script, and more.

`TrainConfig` is plain data that the whole program reads and none changes. Each field's metadata has the
setting's help, bounds and choices for the command line, the configuration files and the web page.
`photo_settings`, `training_settings` and `run_settings` define the fields, `checks` the rules between them.
`files` and `cli.parser` read values from files and flags.

The rank and alpha of each layer: the common ones, or those of `--rank_pattern` and `--alpha_pattern`.
"""

import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import find_asset
from dreambooth_moslora.settings.fields import (
    ATTENTION,
    Prompt,
    check_limits,
    convert,
    field_types,
    grouped,
    nearest,
    parse_pattern,
    pattern_value,
)
from dreambooth_moslora.settings.subjects import SubjectTable, check_subjects

INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact")

of_base = grouped("base model")
of_photos = grouped("photos")
of_prior = grouped("prior preservation")


@dataclass(frozen=True)
class PhotoSettings:
    """The first part of `core.config.TrainConfig`, which converts and checks the values."""

    pretrained_model_name_or_path: str = of_base(
        "toy", 'base model: a diffusers folder, a hub id, a .safetensors checkpoint, or "toy" (embedded)', required=True
    )
    pretrained_vae_model_name_or_path: str | None = of_base(None, "another VAE than the base's own: folder or hub id")
    revision: str | None = of_base(None, "branch, tag or commit of the base on the hub")
    variant: str | None = of_base(None, 'which files of the base to load, for example "fp16"')
    cache_dir: str | None = of_base(None, "where downloads, and encodings with --caching disk, are kept")

    instance_data_dir: str | None = of_photos(None, "folder with the photos of the subject")
    dataset_name: str | None = of_photos(None, "instead of a folder: a data set, on the hub or local")
    dataset_config_name: str | None = of_photos(None, "configuration of --dataset_name")
    image_column: str = of_photos("image", "column of --dataset_name that holds the images")
    caption_column: str | None = of_photos(None, "column of --dataset_name that holds the captions")
    leave_out: tuple[Prompt, ...] = of_photos((), "file names of photos to leave out")
    instance_prompt: str = of_photos(
        "a photo of sks object", 'the subject in words, with its rare token: "a photo of sks dog"', required=True
    )
    subjects: tuple[SubjectTable, ...] = of_photos(
        (), "several subjects in one run: a folder with a folder of each (`sks dog`), a .json list, or in TOML tables"
    )
    token: str | None = of_photos(None, "the rare word in the instance prompt (default: found in it)")
    class_word: str | None = of_photos(None, "the kind of thing it is (default: found in the prompts)")
    caption_prefix: str | None = of_photos(None, "words before each photo's own captions; the instance prompt stays")
    caption_suffix: str | None = of_photos(None, "words after each photo's own captions")
    captions: str = of_photos(
        "given",
        "given: those beside the photos; auto: photos without one get one made before training, in the run folder "
        "(no gain was shown on three sample subjects)",
        choices=("given", "auto"),
    )
    caption_model: str | None = of_photos(
        None,
        "vision-language model that makes captions: hub id or folder (default: Qwen/Qwen3-VL-2B-Instruct; the toy's "
        "own CLIP)",
    )
    shuffle_caption: bool = of_photos(False, "show the tags of a caption, between commas, in changing orders")
    keep_tokens: int = of_photos(0, "tags at a caption's start that --shuffle_caption leaves in place", low=0)
    caption_dropout: float = of_photos(
        0.0, "share of exposures with an empty caption, of photos and not of class images", low=0, high=1
    )
    instance_prompt_share: float | None = of_photos(
        None,
        "share of exposures with the instance prompt, of photos whose captions lack it (default: 1/3; 0 with "
        "--caption_column, whose captions are used as they are)",
        low=0,
        high=1,
    )
    repeats: int = of_photos(1, "how often an epoch shows each photo", low=1, high=10**6)
    resolution: int = of_photos(1024, "side of the square crops, px, a multiple of 8", low=8)
    enable_bucket: bool = of_photos(
        False, "crop each photo to a rectangle of its own shape and of the square's area, instead of to the square"
    )
    bucket_reso_steps: int | None = of_photos(
        None, "sides of such rectangles are multiples of this, px (default: 64; 8 up to a resolution of 256)", low=8
    )
    center_crop: bool = of_photos(False, "crop the middle of each photo instead of a random place")
    random_flip: bool = of_photos(False, "mirror photos at random")
    crops_per_photo: int = of_photos(1, "different crops taken of each photo", low=1, high=1000)
    crop_zoom: float = of_photos(
        1.0, "enlarge each crop by a random factor up to this; 1: crops are as wide as the photo", low=1, high=4
    )
    image_interpolation_mode: str = of_photos("lanczos", "filter of the resizing", choices=INTERPOLATIONS)
    alpha: str = of_photos(
        "mask", "transparent photos go on white; mask: the opaque part is the subject", choices=("mask", "white")
    )
    unmasked_weight: float = of_photos(
        0.2,
        "loss weight of the parts that a mask (name.mask.png) leaves out; it is always 0 for transparent parts",
        low=0,
        high=1,
    )
    masks: str = of_photos(
        "given",
        "given: those beside the photos; auto: photos without one get a mask made before training, in the run folder",
        choices=("given", "auto"),
    )
    mask_model: str | None = of_photos(
        None, "CLIPSeg that makes masks: hub id or folder (default: CIDAS/clipseg-rd64-refined; the toy's own net)"
    )
    mask_prompt: str | None = of_photos(None, "what CLIPSeg looks for in the photos (default: the class word)")

    with_prior_preservation: bool = of_prior(False, "preserve what the base knows of the class")
    prior: str = of_prior(
        "class_images",
        "class_images: train on pictures of the class; adapter_off: on the frozen base's own answer, no pictures",
        choices=("class_images", "adapter_off"),
    )
    class_prompt: str | None = of_prior(None, 'the class in words: "a photo of a dog"')
    prior_prompts: tuple[Prompt, ...] = of_prior(
        (), "other prompts that adapter_off preserves too: every second image draws one of them"
    )
    class_data_dir: str | None = of_prior(None, "folder with class images (default: in the run folder)")
    num_class_images: int = of_prior(100, "class images wanted; missing ones are generated", low=1)
    prior_loss_weight: float = of_prior(1.0, "weight of the prior loss", low=0)
    sample_batch_size: int = of_prior(4, "images generated at once", low=1, high=4096)
    prior_generation_precision: str | None = of_prior(
        None, "precision of that generation", choices=("no", "fp32", "fp16", "bf16")
    )


MIXERS = ("orthogonal", "identity", "kaiming", "butterfly", "none")
ZERO = "zero"
"""Start of the mixer on a frozen basis. Elsewhere it would not train."""
SVD = "svd"
"""The word for the basis of the base's own weights; any other is a file."""
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
SCHEDULE_FREE = "AdamWScheduleFree"
NO_GAIN = "no gain was shown on three sample subjects"
"""`docs/training.md` has the figures."""
OPTIMIZERS = ("AdamW", "Prodigy", SCHEDULE_FREE, "Adafactor")
LOSS_TYPES = ("l2", "huber", "smooth_l1")

of_adapter = grouped("adapter")
of_training = grouped("training")
of_optimizer = grouped("optimizer")


@dataclass(frozen=True)
class TrainingSettings(PhotoSettings):
    """The second part of `core.config.TrainConfig`. Lengths ending in `_steps` count optimizer steps."""

    rank: int = of_adapter(4, "rank r of the adapter", low=1, high=4096)
    lora_alpha: float | None = of_adapter(
        None, "the adapter is scaled by alpha / rank (default: alpha = rank, of each layer)", above=0
    )
    rank_pattern: tuple[str, ...] = of_adapter(
        (), "ranks of some of the UNet's layers, NAME=N: to_k=8, down_blocks.2.*=16; the first match counts"
    )
    alpha_pattern: tuple[str, ...] = of_adapter((), "alphas of some of the UNet's layers, in the same form")
    use_rslora: bool = of_adapter(False, "scale by alpha / sqrt(rank)")
    lora_dropout: float = of_adapter(0.0, "dropout in front of the adapter", low=0, high=0.99)
    use_dora: bool = of_adapter(False, "learn the weights' magnitudes too (DoRA)")
    mixer: str = of_adapter("orthogonal", "start of the r x r mixer; none is plain LoRA", choices=MIXERS)
    train_mixer: bool = of_adapter(True, "learn the mixer")
    mixer_lr_scale: float = of_adapter(1.0, "the mixer's learning rate, as a multiple of the others'", low=0)
    basis: str | None = of_adapter(
        None,
        "train the mixer alone, from zero: A and B are frozen, from the SVD of the base's weights (svd) or those of a "
        "raw adapter file",
    )
    target_modules: tuple[str, ...] = of_adapter(
        ATTENTION,
        "layers of the UNet that get an adapter, by the end of their path (to_q, conv1), with * (down_blocks.2.*), or "
        "a block whose attention is meant (up_blocks.0.attentions.1, mid_block, blora_content, blora_style)",
    )
    train_text_encoder: bool = of_adapter(False, "put adapters on both text encoders too")
    train_text_encoder_ti: bool = of_adapter(
        False,
        "learn new tokens in both text encoders beside the adapter (pivotal tuning), at --text_encoder_lr; on the "
        "embedded base likeness did not rise",
    )
    train_text_encoder_ti_frac: float = of_adapter(
        0.5, "fraction of the steps in which the tokens are learnt; afterwards they are fixed", above=0, high=1
    )
    token_abstraction: str | None = of_adapter(
        None, "the word of the prompts that the tokens stand for (default: TOK, or the instance prompt's rare word)"
    )
    num_new_tokens_per_abstraction: int = of_adapter(2, "how many tokens the word stands for", low=1, high=32)
    initializer_concept: str | None = of_adapter(
        None, "words whose tokens the new ones start from; they set their number (default: random start)"
    )
    init_adapter: str | None = of_adapter(
        None, "begin with an existing adapter: a LoRA file of any program and rank, or a run folder"
    )

    seed: int | None = of_training(None, "seed of everything random", low=0, high=2**63 - 1)
    train_batch_size: int = of_training(4, "photos in one forward pass on each device", low=1, high=4096)
    gradient_accumulation_steps: int = of_training(1, "forward passes in one step", low=1)
    num_train_epochs: int = of_training(1, "times through all photos, when --max_train_steps is not given", low=1)
    max_train_steps: int | None = of_training(None, "optimizer steps; overrides --num_train_epochs", low=1)
    exposures_per_photo: int | None = of_training(
        None, "instead of --max_train_steps: how often the run shows each photo", low=1
    )
    learning_rate: float = of_training(1e-4, "learning rate; 1.0 with Prodigy", low=0, high=100)
    text_encoder_lr: float = of_training(
        5e-6, "learning rate of the text encoders; 0: the same as --learning_rate", low=0, high=100
    )
    scale_lr: bool = of_training(False, "multiply --learning_rate by processes x accumulation x batch size")
    lr_scheduler: str = of_training("constant", "schedule of the learning rate", choices=SCHEDULES)
    lr_warmup_steps: int = of_training(500, "steps of warm-up, where the schedule has one", low=0)
    lr_num_cycles: int = of_training(1, "restarts of cosine_with_restarts", low=1)
    lr_power: float = of_training(1.0, "power of the polynomial schedule", above=0)
    snr_gamma: float | None = of_training(None, f"min-SNR weighting of the loss; 5.0 is usual; {NO_GAIN}", above=0)
    debiased_estimation_loss: bool = of_training(
        False, f"weigh errors by 1/sqrt(SNR), instead of --snr_gamma; {NO_GAIN}"
    )
    noise_offset: float = of_training(
        0.0, "shift the noise of each channel as a whole by draws of this deviation, for very dark or bright pictures; "
        f"{NO_GAIN}",
        low=0, high=1,
    )  # fmt: skip
    loss_type: str = of_training(
        "l2", f"loss at each position: the square, or one that weighs large differences less; {NO_GAIN}",
        choices=LOSS_TYPES,
    )  # fmt: skip
    huber_c: float = of_training(
        0.1, "width beyond which a difference is large, for huber and smooth_l1", above=0, high=1
    )
    huber_schedule: str = of_training(
        "snr", "that width by noise level: the same for all, or wider where there is less noise",
        choices=("constant", "exponential", "snr"),
    )  # fmt: skip
    timestep_bias_strategy: str = of_training(
        "none", "which noise levels are drawn more often: later is the noisiest", choices=("none", "earlier", "later")
    )
    timestep_bias_multiplier: float = of_training(1.0, "how many times as often they are drawn", above=0, high=1e6)
    timestep_bias_portion: float = of_training(0.25, "fraction of the levels that is drawn more often", above=0, high=1)
    do_edm_style_training: bool = of_training(False, "EDM preconditioning of the loss (arXiv 2206.00364)")
    max_grad_norm: float = of_training(1.0, "gradients are clipped to this norm", above=0)
    use_ema: bool = of_training(
        False, f"publish, score and sample the adapter's average over the steps (EMA); {NO_GAIN}"
    )
    ema_decay: float = of_training(
        0.9999, "largest decay of the average per step; it is smaller early on", low=0, below=1
    )

    optimizer: str = of_optimizer(
        "AdamW", "Prodigy finds its rate, AdamWScheduleFree needs no schedule, Adafactor is without momentum",
        choices=OPTIMIZERS,
    )  # fmt: skip
    use_8bit_adam: bool = of_optimizer(False, "AdamW with 8-bit states (bitsandbytes)")
    adam_beta1: float = of_optimizer(0.9, "beta1 of Adam and Prodigy", low=0, below=1)
    adam_beta2: float = of_optimizer(0.999, "beta2 of Adam and Prodigy", low=0, below=1)
    adam_epsilon: float = of_optimizer(1e-8, "epsilon of Adam and Prodigy", above=0)
    adam_weight_decay: float = of_optimizer(1e-4, "weight decay of the UNet's adapter", low=0)
    adam_weight_decay_text_encoder: float = of_optimizer(1e-3, "weight decay of the text encoders' adapters", low=0)
    prodigy_beta3: float | None = of_optimizer(None, "Prodigy: coefficient of its step size", low=0, high=1)
    prodigy_decouple: bool = of_optimizer(True, "Prodigy: AdamW-style weight decay")
    prodigy_use_bias_correction: bool = of_optimizer(True, "Prodigy: bias correction")
    prodigy_safeguard_warmup: bool = of_optimizer(True, "Prodigy: no lr in the denominator of D, for warm-ups")


TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio", "aim", "mlflow", "clearml", "dvclive", "swanlab")
PRECISIONS = ("no", "fp16", "bf16")
MEMORY_WORDS = ("auto", "full", "full_cached", "recompute", "recompute_cached", "nf4")

of_memory = grouped("memory and speed")
of_samples = grouped("samples and evaluation")
of_run = grouped("run folder")
of_hub = grouped("hub")


@dataclass(frozen=True)
class RunSettings(TrainingSettings):
    """The last part of `core.config.TrainConfig`; with those it inherits, it has all settings."""

    memory: str | None = of_memory(
        None,
        "one word for the next flags: one of the plans, from the fastest to the leanest, or auto, the first that fits "
        "the GPU",
        choices=MEMORY_WORDS,
    )
    mixed_precision: str | None = of_memory(
        None, "precision of the frozen base (default: what `accelerate config` says)", choices=PRECISIONS
    )
    base_quantization: str = of_memory("none", "keep the frozen UNet in 4 or 8 bit", choices=("none", "nf4", "int8"))
    gradient_checkpointing: bool = of_memory(False, "less memory, slower steps: recompute activations")
    cache_cross_attention: bool = of_memory(
        False, "keep cross-attention's to_k and to_v off the GPU: their output for each prompt is computed once"
    )
    caching: str = of_memory(
        "memory", "keep encoded photos in memory, on disk for later runs, or encode each step",
        choices=("memory", "disk", "off"),
    )  # fmt: skip
    dataloader_num_workers: int = of_memory(0, "processes that read photos when nothing is cached", low=0, high=1024)
    allow_tf32: bool = of_memory(False, "faster, less exact fp32 products on Nvidia GPUs")
    compile: str = of_memory(
        "auto", "compile the UNet's transformer blocks (torch.compile): auto on a GPU where the run is long enough",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    enable_xformers_memory_efficient_attention: bool = of_memory(False, "accepted: PyTorch's own attention is used")
    local_rank: int = of_memory(-1, "set by the launcher of several processes")

    validation_prompt: str | None = of_samples(None, "prompt of the sample images (default: the instance prompt)")
    num_validation_images: int | None = of_samples(
        None, "sample images each time (default: 4; none on a CPU with a base as large as SDXL)", low=0, high=1000
    )
    validation_epochs: int = of_samples(50, "epochs between samples", low=1)
    validation_steps: int | None = of_samples(None, "steps between samples; overrides --validation_epochs", low=1)
    evaluate_steps: int | None = of_samples(None, "steps between scores of fidelity; 0: never (default: never)", low=0)
    find_scale: bool = of_samples(
        False, "at the end, score the adapter at several scales; the best goes into its header and card"
    )
    early_stopping: int | None = of_samples(
        None, "stop when the score has not risen for this many evaluations (default: only warn)", low=1
    )

    output_dir: str = of_run("lora-dreambooth-model", "the run folder")
    output_kohya_format: bool = of_run(False, "accepted: the file for ComfyUI and A1111 is always written")
    checkpointing_steps: int = of_run(500, "steps between checkpoints", low=1)
    checkpoints_total_limit: int | None = of_run(None, "numbered checkpoints to keep", low=1)
    resume_from_checkpoint: str | None = of_run(None, 'a checkpoint folder, or "latest"')
    logging_dir: str = of_run("logs", "folder of the trackers' logs inside the run folder")
    report_to: str = of_run("tensorboard", "tracker for numbers and samples", choices=(*TRACKERS, "all", "none"))
    dry_run: bool = of_run(False, "print the plan and its cost, and exit")

    push_to_hub: bool = of_hub(False, "upload the adapter and its card when done; never the photos")
    hub_token: str | None = of_hub(None, "token for the upload (default: that of `hf auth login`)", secret=True)
    hub_model_id: str | None = of_hub(None, "repository to upload to (default: the run folder's name)")


def check_together(config: RunSettings) -> None:
    """Raises UserError for the first settings that contradict each other."""
    if config.resolution % 8:
        lower = config.resolution // 8 * 8
        raise UserError(f"--resolution {config.resolution}: must be a multiple of 8, such as {lower or 8}.")
    if (config.bucket_reso_steps or 8) % 8:
        raise UserError(f"--bucket_reso_steps {config.bucket_reso_steps}: must be a multiple of 8, such as 64.")
    if config.enable_bucket and (step := config.bucket_reso_steps or 8) > config.resolution:
        raise UserError(f"--bucket_reso_steps {step}: must be at most --resolution {config.resolution}.")
    if config.instance_data_dir and config.dataset_name:
        raise UserError("--instance_data_dir and --dataset_name: give one of them, not both.")
    if config.subjects:
        check_subjects(config)
    elif config.with_prior_preservation and not config.class_prompt:
        raise UserError('--with_prior_preservation needs --class_prompt, such as "a photo of a dog".')
    for flag in weighting_flags(config) if config.do_edm_style_training else ():
        raise UserError(f"{flag} and --do_edm_style_training: EDM weighs noise levels itself; give one of them.")
    if config.snr_gamma is not None and config.debiased_estimation_loss:
        raise UserError("--snr_gamma and --debiased_estimation_loss: each weighs noise levels; give one of them.")
    if config.exposures_per_photo and config.max_train_steps:
        raise UserError("--exposures_per_photo and --max_train_steps: each sets the steps; give one of them.")
    if config.early_stopping and not config.evaluate_steps:
        raise UserError("--early_stopping needs --evaluate_steps: it stops by the scores.")
    if config.optimizer == "Prodigy" and config.mixer != "none" and config.train_mixer and config.mixer_lr_scale != 1.0:
        raise UserError("--optimizer Prodigy takes one learning rate for all: leave --mixer_lr_scale at 1.")
    if config.optimizer == SCHEDULE_FREE and (config.use_ema or not config.adam_beta1):
        flag = "--use_ema" if config.use_ema else "--adam_beta1 0"
        raise UserError(f"--optimizer {SCHEDULE_FREE} averages its steps itself: leave out {flag}.")
    if config.train_text_encoder and config.train_text_encoder_ti:
        raise UserError("--train_text_encoder and --train_text_encoder_ti: train adapters or new tokens; give one.")
    if config.optimizer == SCHEDULE_FREE and config.train_text_encoder_ti:
        raise UserError(f"--optimizer {SCHEDULE_FREE} averages the adapter alone: give AdamW with new tokens.")
    for flag, why in needs_live_projections(config) if config.cache_cross_attention else ():
        raise UserError(f"--cache_cross_attention and {flag}: {why}; give one of them.")
    if config.init_adapter and config.mixer == "butterfly":
        raise UserError("--init_adapter: the butterfly mixer has no inverse; give another --mixer.")
    for flag, why in excluded_by_basis(config) if config.basis else ():
        raise UserError(f"--basis and {flag}: {why}; give one of them.")
    for name in ("rank_pattern", "alpha_pattern"):
        for text in getattr(config, name):
            parse_pattern(name, text)
    if not config.target_modules:
        raise UserError("--target_modules is empty: name at least one projection, such as to_q.")


def needs_live_projections(config: RunSettings) -> list[tuple[str, str]]:
    """The given flags that make it impossible to compute cross-attention's products with a prompt once, and the
    reasons."""
    changes = "the text of a prompt changes from step to step"
    given = {
        ("--train_text_encoder", changes): config.train_text_encoder,
        ("--train_text_encoder_ti", changes): config.train_text_encoder_ti,
        ("--use_dora", "DoRA reads the weights"): config.use_dora,
        (f"--base_quantization {config.base_quantization}", "it quantises these weights"): config.base_quantization
        != "none",
    }
    return [reason for reason, is_given in given.items() if is_given]


def excluded_by_basis(config: RunSettings) -> list[tuple[str, str]]:
    """The given flags that a frozen basis excludes, and the reasons."""
    given = {
        ("--init_adapter", "each sets A and B"): config.init_adapter,
        ("--use_dora", "the mixer alone is trained"): config.use_dora,
        ("--train_text_encoder", "a basis is the UNet's"): config.train_text_encoder,
        ("--train_text_encoder_ti", "a basis is the UNet's"): config.train_text_encoder_ti,
        (f"--mixer {config.mixer}", "on a basis the mixer starts at zero"): config.mixer != "orthogonal",
        ("--no_train_mixer", "nothing would be trained"): not config.train_mixer,
    }
    return [reason for reason, is_given in given.items() if is_given]


def weighting_flags(config: RunSettings) -> list[str]:
    """The given flags that weigh errors of noise or velocity, which EDM's errors of latents exclude."""
    given = {
        "--snr_gamma": config.snr_gamma is not None,
        "--debiased_estimation_loss": config.debiased_estimation_loss,
        f"--loss_type {config.loss_type}": config.loss_type != "l2",
    }
    return [flag for flag, is_given in given.items() if is_given]


@dataclass(frozen=True)
class TrainConfig(RunSettings):
    """Values are converted and checked on construction; UserError names the wrong setting and the reason.

    None means "not set" where it is allowed. Lengths ending in `_steps` count optimizer steps; sizes are px.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, checked(item, getattr(self, item.name)))
        check_together(self)

    @property
    def keeps_text_encoders(self) -> bool:
        """Whether the steps use the text encoders, so that they stay in memory."""
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def bare_share(self) -> float:
        """The share of exposures with the instance prompt, of photos whose captions lack it. A data set's captions are
        used as they are, as diffusers' scripts do, unless a share was given."""
        if self.instance_prompt_share is not None:
            return self.instance_prompt_share
        return 1 / 3 if self.caption_column is None else 0.0

    @property
    def sample_count(self) -> int:
        """Sample images each time, unless `loop.set_up` leaves them out."""
        return 4 if self.num_validation_images is None else self.num_validation_images

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Settings by name, as from a file. Raises UserError for an unknown name and suggests the nearest known one."""
        check_each(values)
        return cls(**without_removed(values))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of all settings but the secret ones, for `from_dict`."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata["secret"]}
        return {name: plain(value) for name, value in shown.items()}


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [item.to_dict() if isinstance(item, SubjectTable) else item for item in value]
    return value


def is_scored(config: TrainConfig) -> bool:
    """Whether the run draws pictures to score them."""
    return bool(config.evaluate_steps or config.find_scale)


PATH_NAMES = ("_dir", "_checkpoint", "_name_or_path", "_adapter", "basis")
"""Settings whose names end so are paths; `~` is expanded, since no shell expands it in files and after `=`."""
FIELD_TYPES = field_types(TrainConfig)
SPELLINGS = {"optimizer": {name.lower(): name for name in OPTIMIZERS} | {"schedulefree": SCHEDULE_FREE}}
"""Other spellings, in lower case, of a setting's choices."""


REMOVED = dict.fromkeys(
    ("new_backgrounds", "background_scenes"), "removed, as the project's study showed no gain from new backgrounds"
)
"""Settings of earlier versions -> why they are gone. Files of runs that did not use them hold them as 0 or []."""


def checked(item: Field, value: Any) -> Any:
    """The value of one setting, converted and within its limits. Raises UserError."""
    value = convert(item.name, value, FIELD_TYPES[item.name])
    value = SPELLINGS.get(item.name, {}).get(str(value).lower(), value)
    check_limits(item, value)
    if item.name == "instance_data_dir" and value:
        return find_asset(value)
    return os.path.expanduser(value) if value and item.name.endswith(PATH_NAMES) else value


def checked_setting(name: str, value: Any) -> Any:
    """The value of a setting as the configuration will hold it. Raises UserError for a wrong value."""
    return checked(TrainConfig.__dataclass_fields__[name], value)


def check_each(values: Mapping[str, Any]) -> None:
    """Check each given setting; others may be missing. Raises UserError for a wrong name or value.

    A setting in REMOVED may be given if it is off.
    """
    items = {item.name: item for item in fields(TrainConfig)}
    for name, value in values.items():
        if name in items:
            checked(items[name], value)
        elif value or name not in REMOVED:
            raise UserError(unknown_setting(name))


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that an earlier version may have trained, without those in REMOVED."""
    return {name: value for name, value in values.items() if name not in REMOVED}


def unknown_setting(name: str) -> str:
    if name in REMOVED:
        return f"`{name}`: {REMOVED[name]}."
    close = nearest(name.replace("-", "_"), FIELD_TYPES)
    return f"unknown setting `{name}`" + (f": did you mean `{close}`?" if close else "; see --help.")


def rank_and_alpha(config: TrainConfig, component: str, path: str) -> tuple[int, float]:
    """Rank and alpha of one layer. Patterns apply to the UNet only; without an alpha, it equals the layer's rank."""
    is_unet = component == "unet"
    rank = pattern_value(config.rank_pattern if is_unet else (), "rank_pattern", path) or config.rank
    alpha = pattern_value(config.alpha_pattern if is_unet else (), "alpha_pattern", path) or config.lora_alpha
    return int(rank), float(alpha or rank)


def ranks_in_vain(config: TrainConfig, component: str, narrowest: Mapping[str, int]) -> str | None:
    """A warning when a layer's rank exceeds its inputs or its outputs, whichever are fewer (`narrowest`, by
    path); else None."""
    ranks = {path: rank_and_alpha(config, component, path)[0] for path in narrowest}
    wide = [path for path, rank in ranks.items() if rank > narrowest[path]]
    if not wide:
        return None
    first = f"{wide[0]} has rank {ranks[wide[0]]} and {narrowest[wide[0]]} inputs or outputs"
    return f"A rank above the number of a layer's inputs or outputs adds nothing: {first} ({len(wide)} such layers)."
