"""Table of OneTrainer: presets and saved configurations in JSON, with their concepts and samples.

Names and defaults: `modules/util/config/TrainConfig.py` and `ConceptConfig.py` of
Nerogar/OneTrainer.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import read_json, read_small_text
from dreambooth_moslora.importers.converters import (
    convert_optimizer,
    convert_precision,
    convert_resolution,
    convert_schedule,
    flatten_values,
    if_true,
    to_number,
)
from dreambooth_moslora.importers.datasets import (
    complete_class_prompt,
    split_resolutions,
    to_list,
    translate_datasets,
)
from dreambooth_moslora.importers.rows import (
    Ignored,
    Table,
    Translated,
    Translation,
    Unsupported,
    UnsupportedValueError,
)

TRAINER = "OneTrainer"
DEFAULTS = {
    "mixer": "none",
    "rank": 16,
    "lora_alpha": 1.0,
    "target_modules": ["*"],
    "learning_rate": 3e-6,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 200,
    "optimizer": "AdamW",
    "adam_weight_decay": 0.01,
    "adam_weight_decay_text_encoder": 0.01,
    "text_encoder_lr": 0.0,
    "num_train_epochs": 100,
    "train_batch_size": 1,
    "resolution": 512,
    "enable_bucket": True,
    "mixed_precision": "fp16",
    "gradient_checkpointing": True,
    "unmasked_weight": 1.0,
    "caching": "disk",
    "instance_prompt_share": 0.0,
}
"""Settings of a configuration that says nothing of them. Without masked training, masks that lie
beside photos weigh nothing."""
FOUR_BITS = ("NFLOAT_4",)
EIGHT_BITS = ("FLOAT_8", "FLOAT_W8A8", "INT_W8A8", "INT_8", "GGUF_A8_INT", "GGUF_A8_FLOAT")


def convert_weight_type(value: Any) -> dict[str, Any] | None:
    """Return the quantization of the denoiser's weights."""
    if value in FOUR_BITS:
        return {"base_quantization": "nf4"}
    return {"base_quantization": "int8"} if value in EIGHT_BITS else None


def convert_layer_filter(value: Any) -> list[str] | None:
    """Return patterns of a filter: parts of names, or regular expressions that ask for parts."""
    patterns = []
    for text in str(value).split(","):
        for part in re.findall(r"\(\?=\.\*([\w.]+)\)", text) or [text.strip()]:
            if not re.fullmatch(r"[\w.]+", part):
                raise UnsupportedValueError("a filter of parts of names is read")
            patterns.append(f"*{part}*")
    return patterns if str(value).strip() else None


def convert_filter_preset(value: Any) -> list[str] | None:
    """Return the layers of a filter's preset. Raises UnsupportedValueError."""
    presets = {"full": ["*"], "attn-mlp": ["*attentions*"], "attn-only": ["*attn*"]}
    return presets.get(value)


def convert_loss_weight(value: Any) -> dict[str, Any] | None:
    """Return the weighting of the loss. Raises UnsupportedValueError."""
    weightings = {
        "CONSTANT": None,
        "MIN_SNR_GAMMA": {"snr_gamma": 5.0},
        "DEBIASED_ESTIMATION": {"debiased_estimation_loss": True},
    }
    if value not in weightings:
        raise UnsupportedValueError(f"one of {', '.join(weightings)} has a counterpart")
    return weightings[value]


def convert_distribution(value: Any) -> dict[str, Any] | None:
    """Return how noise levels are drawn. Raises UnsupportedValueError."""
    schemes = {"UNIFORM": None, "LOGIT_NORMAL": {"weighting_scheme": "logit_normal"}}
    if value not in schemes:
        raise UnsupportedValueError(f"one of {', '.join(schemes)} has a counterpart")
    return schemes[value]


def convert_dropout(value: Any) -> float:
    """Return the share of empty captions; OneTrainer's default drops a caption as a whole."""
    return float(value)


COLOUR_AND_ANGLE = Unsupported("colours and angles of the photos stay as they are")
CONCEPT_TABLE: Table = {
    "Concepts": {
        "path": Translated("instance_data_dir"),
        "balancing repeats": Translated("repeats", lambda value: max(1, round(float(value)))),
        "balancing_strategy": Unsupported("all photos are shown equally often", ("REPEATS",)),
        "include_subdirectories": Unsupported("photos of one folder are read"),
        "loss_weight": Unsupported("all photos count equally", (1, 1.0)),
        "image_variations": Translated("crops_per_photo", int),
        "text_variations": Ignored("with several lines in a caption file, one is picked each time"),
        "image.enable_crop_jitter": Translated("center_crop", lambda value: not value),
        "image.enable_random_flip": Translated("random_flip"),
        "image.enable_resolution_override": Unsupported("all photos have one resolution"),
        "image.enable_fixed_flip image.enable_random_rotate image.enable_fixed_rotate "
        "image.enable_random_brightness image.enable_fixed_brightness image.enable_random_contrast "
        "image.enable_fixed_contrast image.enable_random_saturation image.enable_fixed_saturation "
        "image.enable_random_hue image.enable_fixed_hue image.enable_random_circular_mask_shrink "
        "image.enable_random_mask_rotate_crop": COLOUR_AND_ANGLE,
        "text.prompt_source": Unsupported("captions lie beside the photos", ("sample", "concept")),
        "text.prompt_path": Translated(
            "instance_prompt", lambda path: read_prompt(path), "the first line of the file"
        ),
        "text.enable_tag_shuffling": Translated("shuffle_caption"),
        "text.tag_delimiter": Unsupported("tags stand between commas", (",",)),
        "text.keep_tags_count": Translated("keep_tokens", int),
        "text.tag_dropout_enable": Unsupported("--caption_dropout leaves out whole captions"),
        "text.caps_randomize_enable": Unsupported("captions keep their capitals"),
        "name seed concept_stats image.random_rotate_max_angle "
        "image.random_brightness_max_strength image.random_contrast_max_strength "
        "image.random_saturation_max_strength image.random_hue_max_strength "
        "image.resolution_override text.tag_dropout_mode text.tag_dropout_probability "
        "text.tag_dropout_special_tags_mode text.tag_dropout_special_tags "
        "text.tag_dropout_special_tags_regex text.caps_randomize_mode "
        "text.caps_randomize_probability text.caps_randomize_lowercase": Ignored(
            "it belongs to a switch"
        ),
    }
}
TABLE: Table = {
    "Model and files": {
        "base_model_name": Translated("pretrained_model_name_or_path"),
        "vae.model_name": Translated("pretrained_vae_model_name_or_path"),
        "training_method": Unsupported("LoRA is trained here", ("LORA",)),
        "peft_type": Unsupported("LoRA is the only kind of adapter here", ("LORA",)),
        "lora_model_name": Translated("init_adapter"),
        "output_model_destination": Translated(
            "output_dir", lambda path: str(Path(path).with_suffix("")), "a folder"
        ),
        "transformer.model_name": Unsupported("give the whole model as the base"),
        "transformer.weight_dtype unet.weight_dtype": Translated(
            "base_quantization", convert_weight_type, "4 and 8 bit"
        ),
        "tensorboard": Translated("report_to", if_true({"report_to": "tensorboard"})),
        "continue_last_backup": Translated(
            "resume_from_checkpoint", if_true({"resume_from_checkpoint": "latest"})
        ),
        "rolling_backup_count": Translated("checkpoints_total_limit", int),
        "secrets.huggingface_token": Translated("hub_token"),
        "model_type output_model_format output_dtype workspace_dir cache_dir debug_mode debug_dir "
        "include_train_config prevent_overwrites backup_after backup_after_unit backup_before_save "
        "rolling_backup save_every save_every_unit save_skip_first save_filename_prefix "
        "backup_on_training_end huggingface_cache_dir offline_mode tensorboard_expose "
        "tensorboard_always_on tensorboard_port __version": Ignored(
            "it is read from the base, or the run folder has its place"
        ),
        "multi_gpu": Unsupported("start several processes by accelerate launch"),
        "cloud.enabled": Unsupported("`fleet` trains on several machines"),
    },
    "Training": {
        "lora_rank": Translated("rank", int),
        "lora_alpha": Translated(convert=to_number),
        "dropout_probability": Translated("lora_dropout", to_number),
        "lora_decompose": Translated("use_dora", remark="one magnitude for each output"),
        "layer_filter": Translated("target_modules", convert_layer_filter),
        "layer_filter_preset": Translated(
            "target_modules", convert_filter_preset, "`full`: all layers"
        ),
        "epochs": Translated("num_train_epochs", int),
        "batch_size": Translated("train_batch_size", int),
        "gradient_accumulation_steps": Translated(convert=int),
        "learning_rate unet.learning_rate transformer.learning_rate": Translated(
            "learning_rate", to_number
        ),
        "learning_rate_scheduler": Translated(
            "lr_scheduler", convert_schedule, "a constant rate is warmed up too"
        ),
        "learning_rate_warmup_steps": Translated(
            "lr_warmup_steps", lambda steps: int(float(steps)), "steps; a share has no counterpart"
        ),
        "learning_rate_cycles": Translated("lr_num_cycles", lambda cycles: int(float(cycles))),
        "learning_rate_min_factor": Unsupported("the rate may fall to 0", (0.0,)),
        "learning_rate_scaler": Unsupported("--scale_lr is nearest", ("NONE",)),
        "clip_grad_norm": Translated("max_grad_norm", to_number),
        "optimizer optimizer.optimizer": Translated("optimizer", convert_optimizer),
        "weight_decay optimizer.weight_decay": Translated("adam_weight_decay", to_number),
        "optimizer.beta1": Translated("adam_beta1", to_number),
        "optimizer.beta2": Translated("adam_beta2", to_number),
        "optimizer.eps": Translated("adam_epsilon", to_number),
        "optimizer.beta3": Translated("prodigy_beta3", to_number),
        "optimizer.d_coef": Unsupported("Prodigy's step size is its own", (1, 1.0)),
        "text_encoder.train text_encoder_2.train": Translated("train_text_encoder"),
        "text_encoder.learning_rate text_encoder_2.learning_rate": Translated(
            "text_encoder_lr", to_number, "one rate for all encoders"
        ),
        "text_encoder_layer_skip": Translated(
            "clip_skip", lambda count: int(count) + 1 if count else None, "Stable Diffusion 1.5"
        ),
        "ema": Unsupported(
            "--optimizer AdamWScheduleFree publishes an average of its steps", ("OFF",)
        ),
        "masked_training": Translated(
            "masks", if_true({"unmasked_weight": 0.1}), "masks beside the photos"
        ),
        "unmasked_weight": Translated(convert=to_number),
        "unmasked_probability": Ignored("every exposure has the photo's mask"),
        "normalize_masked_area_loss masked_prior_preservation_weight custom_conditioning_image": (
            Unsupported("there is no counterpart", (0.0,))
        ),
        "mse_strength": Unsupported("the loss is the mean squared error", (1, 1.0)),
        "mae_strength log_cosh_strength huber_strength": Unsupported(
            "the loss is the mean squared error", (0.0,)
        ),
        "loss_weight_fn": Translated("snr_gamma", convert_loss_weight),
        "offset_noise_weight": Translated("noise_offset", to_number),
        "perturbation_noise_weight generalized_offset_noise": Unsupported(
            "--noise_offset is nearest", (0.0,)
        ),
        "min_noising_strength": Unsupported("all noise levels are drawn", (0.0,)),
        "max_noising_strength": Unsupported("all noise levels are drawn", (1, 1.0)),
        "timestep_distribution": Translated("weighting_scheme", convert_distribution),
        "dynamic_timestep_shifting": Translated("shift_timesteps"),
        "force_v_prediction force_epsilon_prediction "
        "rescale_noise_scheduler_to_zero_terminal_snr": Ignored(
            "it is read from the base's scheduler"
        ),
        "resolution": Translated(
            convert=lambda value: list(map(convert_resolution, str(value).split(","))),
            remark="one or several sides",
        ),
        "aspect_ratio_bucketing": Translated("enable_bucket"),
        "latent_caching": Translated("caching", lambda value: "disk" if value else "off"),
    },
    "Memory, speed and samples": {
        "train_dtype": Translated("mixed_precision", convert_precision),
        "gradient_checkpointing": Translated(
            convert=lambda value: str(value) not in ("OFF", "False")
        ),
        "unet.gradient_checkpointing transformer.gradient_checkpointing": Translated(),
        "layer_offload_fraction unet.offload_fraction transformer.offload_fraction": Translated(
            "stream_blocks", lambda share: float(share) > 0 or None, "all blocks"
        ),
        "compile": Translated(convert=if_true({"compile": "on"})),
        "sample_after sample_after_unit sample_skip_first sample_image_format validation "
        "samples_to_tensorboard non_ema_sampling validate_after validate_after_unit": Ignored(
            "--validation_steps and --evaluate_steps say when samples are generated and scored"
        ),
    },
}
PARTS_WITHOUT_EFFECT = re.compile(
    r"(vae|text_encoder(_\d)?|unet|transformer|prior|effnet_encoder|decoder\w*|embedding\w*|"
    r"additional_embeddings|unconditional_transformer|quantization|cloud|secrets|optimizer\w*|lokr|oft|"
    r"loss_weight_strength|noising_\w+|timestep_shift|text_encoder\w*|huber_delta|vb_loss_strength|"
    r"samples?|concepts?|.*_gradient_reduce\w*|lora|async|attention|dataloader|train_device|temp|"
    r"fallback|enable_|only_cache|frames|loss_scaler|clear_|ema_|custom_|scheduler_params|device|"
    r"force_circular|fused|gradient_reduce|bundle|preserve|layer_filter_regex|weight_dtype)"
    r"[\w.]*"
)
"""Keys that say nothing of a LoRA of the denoiser, or that belong to another key."""


def matches_file(content: Mapping[str, Any]) -> bool:
    """Return whether the content is that of a preset or a saved configuration."""
    return "training_method" in content or {"base_model_name", "model_type"} <= content.keys()


def translate_config(content: Mapping[str, Any]) -> Translation:
    """Return the settings of a configuration. Raises UserError for a file of concepts or samples
    that it names and that cannot be read."""
    translation = Translation(TRAINER)
    values = flatten_values(content)
    concepts = read_list(values.pop("concepts", None), values.pop("concept_file_name", None))
    samples = read_list(
        values.pop("samples", None), values.pop("sample_definition_file_name", None)
    )
    rows = {key for rows in TABLE.values() for keys in rows for key in keys.split()}
    kept = {k: v for k, v in values.items() if k in rows or not PARTS_WITHOUT_EFFECT.fullmatch(k)}

    # A filter of its own counts before the preset that it was made from.
    if kept.get("layer_filter"):
        kept.pop("layer_filter_preset", None)
    translation.translate_values(TABLE, kept)
    translate_datasets(translation, CONCEPT_TABLE, list_datasets(concepts))
    translation.settings.setdefault("instance_prompt", "")
    prompts = [item["prompt"] for item in samples if item.get("enabled", True)]
    if prompts:
        translation.set_values({"validation_prompt": prompts}, "samples")
    complete_settings(translation, values)
    complete_class_prompt(translation)
    translation.add_defaults(DEFAULTS)
    return translation


def read_list(items: Any, file_name: Any) -> list[Mapping[str, Any]]:
    """Return the items that stand in the configuration, or else in the file that it names. Raises
    UserError for a file that is there and cannot be read."""
    if not items and file_name and Path(file_name).is_file():
        items = read_json(Path(file_name), list)
    return [item for item in items or () if isinstance(item, Mapping)]


def read_prompt(path: Any) -> str | None:
    """Return the first line of a file of prompts; None without the file."""
    file = Path(str(path))
    return read_small_text(file).strip().partition("\n")[0] if file.is_file() else None


def list_datasets(
    concepts: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the concepts that are switched on, and whether their images are those of the class."""
    for concept in concepts:
        values = {"text.prompt_path": ""} | flatten_values(concept)
        kind = values.pop("type", "STANDARD")
        if values.pop("enabled", True) and kind != "VALIDATION":
            yield values, kind == "PRIOR_PREDICTION"


def complete_settings(translation: Translation, values: Mapping[str, Any]) -> None:
    """Store what depends on several keys: resolutions, noise levels, weightings, the schedule."""
    settings = translation.settings
    settings |= split_resolutions(to_list(settings.get("resolution")))
    if settings.get("weighting_scheme") == "logit_normal":
        shift = float(values.get("timestep_shift") or 1.0)
        mean = float(values.get("noising_bias") or 0.0) + math.log(shift)
        std = float(values.get("noising_weight") or 0.0) + 1.0
        translation.set_values(
            {"logit_mean": mean, "logit_std": std}, "noising_bias, timestep_shift"
        )
    if "snr_gamma" in settings and values.get("loss_weight_strength"):
        settings["snr_gamma"] = float(values["loss_weight_strength"])
    if settings.get("lr_scheduler", "constant") == "constant":
        settings["lr_scheduler"] = "constant_with_warmup"
    if "adam_weight_decay" in settings:
        settings["adam_weight_decay_text_encoder"] = settings["adam_weight_decay"]
