"""Types of the settings as arguments, for type checkers and editors alone.

`python -m tools.tables` writes this file.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypedDict

class TrainSettings(TypedDict, total=False):
    base: str | PathLike[str] | None
    pretrained_model_name_or_path: str | PathLike[str]
    pretrained_vae_model_name_or_path: str | PathLike[str] | None
    revision: str | None
    variant: str | None
    cache_dir: str | PathLike[str] | None
    instance_data_dir: str | PathLike[str] | None
    leave_out: Sequence[str]
    instance_prompt: str
    subjects: str | PathLike[str] | Sequence[Mapping[str, Any]]
    token: str | None
    class_word: str | None
    subject: str
    describe: Sequence[str]
    caption_prefix: str | None
    captions: str
    caption_model: str | None
    shuffle_caption: bool
    keep_tokens: int
    caption_dropout: float
    instance_prompt_share: float | None
    repeats: int
    resolution: int
    more_resolutions: Sequence[str]
    enable_bucket: bool
    bucket_reso_steps: int | None
    center_crop: bool
    random_flip: bool
    crops_per_photo: int
    crop_zoom: float
    unmasked_weight: float
    synthetic_weight: float
    masks: str
    mask_model: str | None
    mask_prompt: str | None
    with_prior_preservation: bool
    prior: str
    class_prompt: str | None
    prior_prompts: Sequence[str]
    class_data_dir: str | PathLike[str] | None
    num_class_images: int
    prior_loss_weight: float
    sample_batch_size: int
    rank: int
    lora_alpha: float | None
    rank_pattern: Sequence[str]
    alpha_pattern: Sequence[str]
    use_rslora: bool
    lora_dropout: float
    use_dora: bool
    mixer: str
    train_mixer: bool
    mixer_lr_scale: float
    target_modules: Sequence[str]
    lora_blocks: Sequence[str]
    train_text_encoder: bool
    init_adapter: str | PathLike[str] | None
    companion: str | PathLike[str] | None
    seed: int | None
    train_batch_size: int
    gradient_accumulation_steps: int
    num_train_epochs: int
    max_train_steps: int | None
    exposures_per_photo: int | None
    learning_rate: float
    text_encoder_lr: float
    scale_lr: bool
    lr_scheduler: str
    lr_warmup_steps: int
    lr_num_cycles: int
    lr_power: float
    snr_gamma: float | None
    debiased_estimation_loss: bool
    noise_offset: float
    do_edm_style_training: bool
    weighting_scheme: str | None
    logit_mean: float
    logit_std: float
    mode_scale: float
    precondition_outputs: bool | None
    shift_timesteps: bool
    flow_shift: float | None
    guidance_scale: float
    max_sequence_length: int | None
    text_encoder_out_layers: Sequence[str]
    clip_skip: int | None
    max_grad_norm: float
    optimizer: str
    use_8bit_adam: bool
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    adam_weight_decay: float
    adam_weight_decay_text_encoder: float
    prodigy_beta3: float | None
    prodigy_decouple: bool
    prodigy_use_bias_correction: bool
    prodigy_safeguard_warmup: bool
    memory: str | None
    mixed_precision: str | None
    base_quantization: str
    gradient_checkpointing: bool
    recompute_feed_forward: bool
    stream_blocks: bool
    streamed_share: float
    images_at_once: int | None
    caching: str
    cache_latents: bool
    offload: bool
    allow_tf32: bool
    compile: str
    deterministic: bool
    enable_xformers_memory_efficient_attention: bool
    validation_prompt: Sequence[str] | None
    num_validation_images: int | None
    validation_epochs: int
    validation_steps: int | None
    evaluate_steps: int | None
    output_dir: str | PathLike[str]
    checkpointing_steps: int
    checkpoints_total_limit: int | None
    resume_from_checkpoint: str | PathLike[str] | None
    logging_dir: str | PathLike[str]
    report_to: str
    dry_run: bool
    push_to_hub: bool
    hub_token: str | None
    hub_model_id: str | None
