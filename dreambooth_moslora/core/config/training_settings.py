"""Settings of the adapter, its training and its optimizer."""

from dataclasses import dataclass

from dreambooth_moslora.core.config.fields import grouped
from dreambooth_moslora.core.config.photo_settings import PhotoSettings
from dreambooth_moslora.core.config.targets import ATTENTION

__all__ = ["MIXERS", "OPTIMIZERS", "SCHEDULE_FREE", "SVD", "ZERO", "TrainingSettings"]

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
