"""All settings of a training run, in one frozen dataclass: the flags of diffusers' script, and ours.

`TrainConfig` is plain data: every part of the program below the command line reads it and none changes it. The help
text, bounds and choices of each setting are in its field's metadata, so that the command line, the configuration
files and the web page say the same. How values get here from files and flags is in `config_files` and `cli.parser`.
"""

import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from dreambooth_moslora.core.assets import find_asset
from dreambooth_moslora.core.config_fields import Prompt, check_limits, convert, field_types, grouped, nearest
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.subject_tables import SubjectTable, check_subjects
from dreambooth_moslora.core.targets import ATTENTION, parse_pattern

__all__ = [
    "INTERPOLATIONS",
    "MIXERS",
    "OPTIMIZERS",
    "SCHEDULE_FREE",
    "TrainConfig",
    "check_each",
    "checked_setting",
    "is_scored",
    "weighting_flags",
]

MIXERS = ("orthogonal", "identity", "kaiming", "butterfly", "none")
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
SCHEDULE_FREE = "AdamWScheduleFree"
OPTIMIZERS = ("AdamW", "Prodigy", SCHEDULE_FREE, "Adafactor")
LOSS_TYPES = ("l2", "huber", "smooth_l1")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio", "aim", "mlflow", "clearml", "dvclive", "swanlab")
PRECISIONS = ("no", "fp16", "bf16")

of_base = grouped("base model")
of_photos = grouped("photos")
of_prior = grouped("prior preservation")
of_adapter = grouped("adapter")
of_training = grouped("training")
of_optimizer = grouped("optimizer")
of_memory = grouped("memory and speed")
of_samples = grouped("samples and evaluation")
of_run = grouped("run folder")
of_hub = grouped("hub")


@dataclass(frozen=True)
class TrainConfig:
    """Values are converted and checked on construction: UserError says which setting is wrong and why.

    None means "not set" wherever it is allowed. Lengths ending in `_steps` count optimizer steps; sizes are px.
    """

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
    instance_prompt: str = of_photos(
        "a photo of sks object", 'the subject in words, with its rare token: "a photo of sks dog"', required=True
    )
    subjects: tuple[SubjectTable, ...] = of_photos(
        (), "several subjects in one run: a folder with a folder of each (`sks dog`), a .json list, or in TOML tables"
    )
    token: str | None = of_photos(None, "the rare word in the instance prompt (default: found in it)")
    class_word: str | None = of_photos(None, "the kind of thing it is (default: found in the prompts)")
    caption_prefix: str | None = of_photos(None, "words before each photo's own captions; the instance prompt stays")
    caption_suffix: str | None = of_photos(None, "words behind each photo's own captions")
    captions: str = of_photos(
        "given",
        "given: those beside the photos; auto: photos without one get one made before training, in the run folder "
        "(no gain was shown on two toys)",
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
    repeats: int = of_photos(1, "how often each photo counts in an epoch", low=1, high=10**6)
    resolution: int = of_photos(1024, "side of the square crop that is trained on, px, a multiple of 8", low=8)
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
        "weight in the loss of the surroundings that a mask (name.mask.png) leaves out; of transparency it is always 0",
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

    with_prior_preservation: bool = of_prior(False, "keep what the base knows of the class while the subject is learnt")
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

    rank: int = of_adapter(4, "rank r of the adapter", low=1, high=4096)
    lora_alpha: float | None = of_adapter(
        None, "the adapter is scaled by alpha / rank (default: alpha = rank, of each layer)", above=0
    )
    rank_pattern: tuple[str, ...] = of_adapter(
        (), "other ranks of some of the UNet's layers, NAME=N: to_k=8, down_blocks.2.*=16; the first that fits counts"
    )
    alpha_pattern: tuple[str, ...] = of_adapter((), "other alphas of some of the UNet's layers, in the same way")
    use_rslora: bool = of_adapter(False, "scale by alpha / sqrt(rank)")
    lora_dropout: float = of_adapter(0.0, "dropout in front of the adapter", low=0, high=0.99)
    use_dora: bool = of_adapter(False, "learn the weights' magnitudes too (DoRA)")
    mixer: str = of_adapter("orthogonal", "start of the r x r mixer; none is plain LoRA", choices=MIXERS)
    train_mixer: bool = of_adapter(True, "learn the mixer")
    mixer_lr_scale: float = of_adapter(1.0, "the mixer's learning rate, as a multiple of the others'", low=0)
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
        0.5, "share of the steps in which the tokens are learnt; after it they stay as they are", above=0, high=1
    )
    token_abstraction: str | None = of_adapter(
        None, "the word of the prompts that the tokens stand for (default: TOK, or the instance prompt's rare word)"
    )
    num_new_tokens_per_abstraction: int = of_adapter(2, "how many tokens the word stands for", low=1, high=32)
    initializer_concept: str | None = of_adapter(
        None, "words that the tokens begin as, as many as those have (default: random, of the usual size)"
    )
    init_adapter: str | None = of_adapter(
        None, "begin with an existing adapter: a LoRA file of any program and rank, or a run folder"
    )

    seed: int | None = of_training(None, "seed of everything random", low=0, high=2**63 - 1)
    train_batch_size: int = of_training(4, "photos in one forward pass, a device", low=1, high=4096)
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
    lr_scheduler: str = of_training("constant", "course of the learning rate", choices=SCHEDULES)
    lr_warmup_steps: int = of_training(500, "steps of warm-up, where the schedule has one", low=0)
    lr_num_cycles: int = of_training(1, "restarts of cosine_with_restarts", low=1)
    lr_power: float = of_training(1.0, "power of the polynomial schedule", above=0)
    snr_gamma: float | None = of_training(None, "min-SNR weighting of the loss; 5.0 is usual", above=0)
    debiased_estimation_loss: bool = of_training(False, "weigh errors by 1/sqrt(SNR), in the place of --snr_gamma")
    noise_offset: float = of_training(
        0.0, "shift the noise of each channel as a whole by draws of this deviation, for very dark or bright pictures",
        low=0, high=1,
    )  # fmt: skip
    loss_type: str = of_training(
        "l2", "error of a place: its square, or one that large differences count less in", choices=LOSS_TYPES
    )
    huber_c: float = of_training(
        0.1, "width beyond which a difference is large, for huber and smooth_l1", above=0, high=1
    )
    huber_schedule: str = of_training(
        "snr", "that width by noise level: the same for all, or wider where there is less noise",
        choices=("constant", "exponential", "snr"),
    )  # fmt: skip
    timestep_bias_strategy: str = of_training(
        "none", "which noise levels are drawn oftener: later is the noisiest", choices=("none", "earlier", "later")
    )
    timestep_bias_multiplier: float = of_training(1.0, "how much oftener", above=0, high=1e6)
    timestep_bias_portion: float = of_training(0.25, "share of all noise levels that is meant", above=0, high=1)
    do_edm_style_training: bool = of_training(False, "EDM preconditioning of the loss (arXiv 2206.00364)")
    max_grad_norm: float = of_training(1.0, "gradients are clipped to this norm", above=0)
    use_ema: bool = of_training(False, "publish, score and sample the adapter's average over the steps (EMA)")
    ema_decay: float = of_training(
        0.9999, "what the average keeps at each step, at most; fewer early on", low=0, below=1
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

    memory: str | None = of_memory(
        None,
        "one word for the next flags: full, recompute, nf4, or auto, the first that fits the GPU",
        choices=("auto", "full", "recompute", "nf4"),
    )
    mixed_precision: str | None = of_memory(
        None, "precision of the frozen base (default: what `accelerate config` says)", choices=PRECISIONS
    )
    base_quantization: str = of_memory("none", "keep the frozen UNet in 4 or 8 bit", choices=("none", "nf4", "int8"))
    gradient_checkpointing: bool = of_memory(False, "less memory, slower steps: recompute activations")
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
        None, "sample images a time (default: 4; none on a CPU with a base as large as SDXL)", low=0, high=1000
    )
    validation_epochs: int = of_samples(50, "epochs between samples", low=1)
    validation_steps: int | None = of_samples(None, "steps between samples; overrides --validation_epochs", low=1)
    evaluate_steps: int | None = of_samples(None, "steps between scores of fidelity (default: never)", low=1)
    find_scale: bool = of_samples(
        False, "at the end, score the adapter at several scales; the best goes into its header and card"
    )
    early_stopping: int | None = of_samples(
        None, "stop when the score has not risen for this many evaluations (default: only say so)", low=1
    )

    output_dir: str = of_run("lora-dreambooth-model", "the run folder")
    output_kohya_format: bool = of_run(False, "accepted: the file for ComfyUI and A1111 is always written")
    checkpointing_steps: int = of_run(500, "steps between checkpoints", low=1)
    checkpoints_total_limit: int | None = of_run(None, "numbered checkpoints to keep", low=1)
    resume_from_checkpoint: str | None = of_run(None, 'a checkpoint folder, or "latest"')
    logging_dir: str = of_run("logs", "folder of the trackers' logs inside the run folder")
    report_to: str = of_run("tensorboard", "where the numbers and the samples go", choices=(*TRACKERS, "all", "none"))
    dry_run: bool = of_run(False, "print what would be done, and what it would cost, and exit")

    push_to_hub: bool = of_hub(False, "upload the adapter and its card when done; never the photos")
    hub_token: str | None = of_hub(None, "token for the upload (default: that of `hf auth login`)", secret=True)
    hub_model_id: str | None = of_hub(None, "repository to upload to (default: the run folder's name)")

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, checked(item, getattr(self, item.name)))
        self._check_together()

    def _check_together(self) -> None:
        if self.resolution % 8:
            lower = self.resolution // 8 * 8
            raise UserError(f"--resolution {self.resolution}: must be a multiple of 8, such as {lower or 8}.")
        if (self.bucket_reso_steps or 8) % 8:
            raise UserError(f"--bucket_reso_steps {self.bucket_reso_steps}: must be a multiple of 8, such as 64.")
        if self.enable_bucket and (step := self.bucket_reso_steps or 8) > self.resolution:
            raise UserError(f"--bucket_reso_steps {step}: must be at most --resolution {self.resolution}.")
        if self.enable_bucket and self.with_prior_preservation and self.prior == "class_images":
            raise UserError(
                "--enable_bucket needs --prior adapter_off, which takes every shape: class images are square."
            )
        if self.instance_data_dir and self.dataset_name:
            raise UserError("--instance_data_dir and --dataset_name: give one of them, not both.")
        if self.subjects:
            check_subjects(self)
        elif self.with_prior_preservation and not self.class_prompt:
            raise UserError('--with_prior_preservation needs --class_prompt, such as "a photo of a dog".')
        for flag in weighting_flags(self) if self.do_edm_style_training else ():
            raise UserError(f"{flag} and --do_edm_style_training: EDM weighs noise levels itself; give one of them.")
        if self.snr_gamma is not None and self.debiased_estimation_loss:
            raise UserError("--snr_gamma and --debiased_estimation_loss: each weighs noise levels; give one of them.")
        if self.exposures_per_photo and self.max_train_steps:
            raise UserError("--exposures_per_photo and --max_train_steps: each sets the steps; give one of them.")
        if self.early_stopping and not self.evaluate_steps:
            raise UserError("--early_stopping needs --evaluate_steps: without scores there is nothing to wait for.")
        if self.optimizer == "Prodigy" and self.mixer != "none" and self.train_mixer and self.mixer_lr_scale != 1.0:
            raise UserError("--optimizer Prodigy takes one learning rate for all: leave --mixer_lr_scale at 1.")
        if self.optimizer == SCHEDULE_FREE and (self.use_ema or not self.adam_beta1):
            flag = "--use_ema" if self.use_ema else "--adam_beta1 0"
            raise UserError(f"--optimizer {SCHEDULE_FREE} averages its steps itself: leave out {flag}.")
        if self.train_text_encoder and self.train_text_encoder_ti:
            raise UserError("--train_text_encoder and --train_text_encoder_ti: train adapters or new tokens; give one.")
        if self.optimizer == SCHEDULE_FREE and self.train_text_encoder_ti:
            raise UserError(f"--optimizer {SCHEDULE_FREE} averages the adapter alone: give AdamW with new tokens.")
        if self.init_adapter and self.mixer == "butterfly":
            raise UserError("--init_adapter: the butterfly mixer has no inverse; give another --mixer.")
        for name in ("rank_pattern", "alpha_pattern"):
            for text in getattr(self, name):
                parse_pattern(name, text)
        if not self.target_modules:
            raise UserError("--target_modules is empty: name at least one projection, such as to_q.")

    @property
    def keeps_text_encoders(self) -> bool:
        """Whether training itself asks them, so that they stay in memory."""
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def sample_count(self) -> int:
        """Sample images a time, unless `loop.set_up` leaves them out."""
        return 4 if self.num_validation_images is None else self.num_validation_images

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Settings by name, as from a file. Raises UserError for an unknown name, with the nearest known one."""
        check_each(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of all settings but the secret ones. `from_dict` takes it back."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata["secret"]}
        return {name: plain(value) for name, value in shown.items()}


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [item.to_dict() if isinstance(item, SubjectTable) else item for item in value]
    return value


def weighting_flags(config: TrainConfig) -> list[str]:
    """The given flags that suit only errors of noise or velocity, and not EDM's of the latents."""
    given = {
        "--snr_gamma": config.snr_gamma is not None,
        "--debiased_estimation_loss": config.debiased_estimation_loss,
        f"--loss_type {config.loss_type}": config.loss_type != "l2",
    }
    return [flag for flag, is_given in given.items() if is_given]


def is_scored(config: TrainConfig) -> bool:
    """Whether the run draws pictures to score them."""
    return bool(config.evaluate_steps or config.find_scale)


PATH_NAMES = ("_dir", "_checkpoint", "_name_or_path", "_adapter")
"""Settings whose names end so are paths: `~` is expanded, as no shell has done it in files and after `=`."""
FIELD_TYPES = field_types(TrainConfig)
SPELLINGS = {"optimizer": {name.lower(): name for name in OPTIMIZERS} | {"schedulefree": SCHEDULE_FREE}}
"""Other spellings, in lower case, of a setting's choices."""


def checked(item: Field, value: Any) -> Any:
    """The value of one setting, of its type and within its limits. Raises UserError."""
    value = convert(item.name, value, FIELD_TYPES[item.name])
    value = SPELLINGS.get(item.name, {}).get(str(value).lower(), value)
    check_limits(item, value)
    if item.name == "instance_data_dir" and value:
        return find_asset(value)
    return os.path.expanduser(value) if value and item.name.endswith(PATH_NAMES) else value


def checked_setting(name: str, value: Any) -> Any:
    """A given setting as the configuration will hold it. Raises UserError for a wrong value."""
    return checked(TrainConfig.__dataclass_fields__[name], value)


def check_each(values: Mapping[str, Any]) -> None:
    """Check each given setting; others may be missing. Raises UserError for a wrong name or value."""
    items = {item.name: item for item in fields(TrainConfig)}
    for name, value in values.items():
        if name not in items:
            raise UserError(unknown_setting(name))
        checked(items[name], value)


def unknown_setting(name: str) -> str:
    close = nearest(name.replace("-", "_"), FIELD_TYPES)
    return f"unknown setting `{name}`" + (f": did you mean `{close}`?" if close else "; see --help.")
