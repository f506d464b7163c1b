"""Table of OneTrainer: presets and saved configurations in JSON, with their concepts and samples.

Names and defaults: `modules/util/config/TrainConfig.py` and `ConceptConfig.py` of
Nerogar/OneTrainer.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import read_json, read_small_text
from dreambooth_moslora.importers.converters import (
    AVERAGE_ROW,
    CLIPPING_ROW,
    choose,
    convert_optimizer,
    convert_precision,
    convert_resolution,
    flatten_values,
    if_true,
    read_number,
)
from dreambooth_moslora.importers.datasets import list_mappings, split_resolutions
from dreambooth_moslora.importers.families import FAMILIES_BY_NAME, set_noise_levels
from dreambooth_moslora.importers.rows import (
    Ignored,
    Table,
    Translated,
    Translation,
    Unsupported,
    UnsupportedValueError,
    list_rows,
)
from dreambooth_moslora.importers.trainer import Datasets, Trainer

DEFAULTS = {
    "rank": 16,
    "lora_alpha": 1.0,
    "learning_rate": 3e-6,
    "text_encoder_lr": 0.0,
    "num_train_epochs": 100,
    "train_batch_size": 1,
    "resolution": 512,
    "enable_bucket": True,
    "mixed_precision": "fp16",
    "gradient_checkpointing": True,
    "unmasked_weight": 1.0,
    "caching": "disk",
    "center_crop": False,
}
"""Settings of a configuration that says nothing of them. Without masked training, masks that lie
beside photos weigh nothing."""
EIGHT_BITS = ("FLOAT_8", "FLOAT_W8A8", "INT_W8A8", "INT_8", "GGUF_A8_INT", "GGUF_A8_FLOAT")


WARMUP_STEPS = 200
FAMILIES = {
    "STABLE_DIFFUSION_15": "sd1",
    "STABLE_DIFFUSION_XL": "sdxl",
    "STABLE_DIFFUSION_3": "sd3",
    "FLUX_2": "flux2",
    "FLUX_DEV_1": "flux",
    "Z_IMAGE": "z_image",
    "QWEN": "qwen_image",
    "KREA_2": "krea2",
    "SANA": "sana",
    "ANIMA": "anima",
}
"""Start of `model_type` -> family."""
SCHEDULES = {
    "CONSTANT": "constant_with_warmup",
    "LINEAR": "linear",
    "COSINE": "cosine",
    "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts",
}
LOSS_WEIGHTS = {
    "CONSTANT": None,
    "MIN_SNR_GAMMA": {"snr_gamma": 5.0},
    "DEBIASED_ESTIMATION": {"debiased_estimation_loss": True},
}
NOISE_LEVELS = {"UNIFORM": "none", "LOGIT_NORMAL": "logit_normal", "HEAVY_TAIL": "mode"}
"""`timestep_distribution` -> `weighting_scheme`."""
UNET_BLOCKS = ["down_blocks.*", "mid_block.*", "up_blocks.*"]
BLOCKS = {"attn-only": ["*attn*"], "blocks": ["*transformer_blocks.*"], "full": ["*"]}
FEED_FORWARD = {
    "flux": ["*ff.net*", "*proj_mlp*"],
    "qwen_image": ["*img_mlp*", "*txt_mlp*"],
    "krea2": ["transformer_blocks.*.ff.*"],
    "anima": ["*ff*"],
}
FILTER_PRESETS = {
    "sdxl": {"attn-mlp": ["*attentions*"], "full": UNET_BLOCKS},
    "sd1": {"attn-mlp": ["*attentions*"], "full": UNET_BLOCKS},
    "z_image": {
        "attn-mlp": ["layers.*attention*", "layers.*feed_forward*"],
        "attn-only": ["layers.*attention*"],
        "blocks": ["*layers.*"],
    },
    **{name: {"attn-mlp": ["*attn*", *layers]} for name, layers in FEED_FORWARD.items()},
}
"""Family -> its presets of `layer_filter_preset`, where they are not BLOCKS."""
LOOKAHEAD = re.compile(r"\^?(?:\(\?=\.\*([\w.]+)\))(\(\?!\.\*refiner\))?(?:\.\*)?")
"""Regular expression of a filter that asks for a part of a name, and for none of a refiner."""


def convert_layer_filter(value: Any) -> list[str] | None:
    """Return patterns of a filter: parts of names, or regular expressions that ask for parts."""
    patterns = []
    for text in filter(None, map(str.strip, str(value).split(","))):
        match = LOOKAHEAD.fullmatch(text)
        if match:
            patterns.append(f"layers.*{match[1]}*" if match[2] else f"*{match[1]}*")
        elif re.fullmatch(r"[\w.]+", text):
            patterns.append(f"*{text}*")
        else:
            raise UnsupportedValueError("a filter of parts of names is read")
    return patterns or None


def convert_warmup(value: Any) -> int:
    """Return whole steps of warm-up. Raises UnsupportedValueError for a share of the run."""
    if 0 < float(value) <= 1:
        raise UnsupportedValueError("give the warm-up in steps")
    return max(0, int(float(value)))


def convert_offload_share(value: Any) -> dict[str, Any] | None:
    """Return the settings that keep this share of the blocks in the host's memory."""
    share = float(value)
    return {"stream_blocks": True, "streamed_share": share} if share > 0 else None


COLOUR_AND_ANGLE = Unsupported("colours and angles of the photos stay as they are")
CONCEPT_TABLE: Table = {
    "Concepts": {
        "path": Translated("instance_data_dir"),
        "balancing repeats": Translated("repeats", lambda value: max(1, round(float(value)))),
        "balancing_strategy": Unsupported("all photos are shown equally often", ("REPEATS",)),
        "include_subdirectories": Unsupported("photos of one folder are read"),
        "loss_weight": Unsupported("all photos count equally", (1, 1.0)),
        "image_variations": Translated("crops_per_photo"),
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
        "text.keep_tags_count": Translated("keep_tokens"),
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
            "base_quantization",
            {"NFLOAT_4": "nf4", **dict.fromkeys(EIGHT_BITS, "int8")}.get,
            "4 and 8 bit",
        ),
        "tensorboard": Translated("report_to", if_true({"report_to": "tensorboard"})),
        "continue_last_backup": Translated(
            "resume_from_checkpoint", if_true({"resume_from_checkpoint": "latest"})
        ),
        "rolling_backup_count": Translated("checkpoints_total_limit"),
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
        "lora_rank": Translated("rank"),
        "lora_alpha": Translated(),
        "dropout_probability": Translated("lora_dropout"),
        "lora_decompose": Translated("use_dora", remark="one magnitude for each output"),
        "layer_filter": Translated("target_modules", convert_layer_filter),
        "layer_filter_preset": Translated(
            "target_modules", lambda value: None, "`full`: all layers"
        ),
        "epochs": Translated("num_train_epochs"),
        "batch_size": Translated("train_batch_size"),
        "gradient_accumulation_steps": Translated(),
        "learning_rate unet.learning_rate transformer.learning_rate": Translated("learning_rate"),
        "learning_rate_scheduler": Translated(
            "lr_scheduler", choose(SCHEDULES), "a constant rate is warmed up too"
        ),
        "learning_rate_warmup_steps": Translated(
            "lr_warmup_steps", convert_warmup, "batches there, so divided by the accumulation"
        ),
        "learning_rate_cycles": Translated("lr_num_cycles", lambda cycles: int(float(cycles))),
        "learning_rate_min_factor": Unsupported("the rate may fall to 0", (0.0,)),
        "learning_rate_scaler": Unsupported("--scale_lr is nearest", ("NONE",)),
        "clip_grad_norm": CLIPPING_ROW,
        "optimizer optimizer.optimizer": Translated("optimizer", convert_optimizer),
        "weight_decay optimizer.weight_decay": Translated("adam_weight_decay"),
        "optimizer.beta1": Translated("adam_beta1"),
        "optimizer.beta2": Translated("adam_beta2"),
        "optimizer.eps": Translated("adam_epsilon"),
        "optimizer.beta3": Translated("prodigy_beta3"),
        "optimizer.d_coef": Unsupported("Prodigy's step size is its own", (1, 1.0)),
        "text_encoder.train text_encoder_2.train": Translated("train_text_encoder"),
        "text_encoder.learning_rate text_encoder_2.learning_rate": Translated(
            "text_encoder_lr", remark="one rate for all encoders"
        ),
        "text_encoder_layer_skip": Translated(
            "clip_skip", lambda count: int(count) + 1 if count else None, "Stable Diffusion 1.5"
        ),
        "ema": AVERAGE_ROW,
        "masked_training": Translated(
            "masks", if_true({"unmasked_weight": 0.1}), "masks beside the photos"
        ),
        "unmasked_weight": Translated(),
        "unmasked_probability": Ignored("every exposure has the photo's mask"),
        "normalize_masked_area_loss masked_prior_preservation_weight custom_conditioning_image": (
            Unsupported("there is no counterpart", (0.0,))
        ),
        "mse_strength": Unsupported("the loss is the mean squared error", (1, 1.0)),
        "mae_strength log_cosh_strength huber_strength": Unsupported(
            "the loss is the mean squared error", (0.0,)
        ),
        "loss_weight_fn": Translated("snr_gamma", choose(LOSS_WEIGHTS)),
        "offset_noise_weight": Translated("noise_offset"),
        "perturbation_noise_weight generalized_offset_noise": Unsupported(
            "--noise_offset is nearest", (0.0,)
        ),
        "min_noising_strength": Unsupported("all noise levels are drawn", (0.0,)),
        "max_noising_strength": Unsupported("all noise levels are drawn", (1, 1.0)),
        "timestep_distribution": Translated(
            "weighting_scheme",
            choose(dict.fromkeys(NOISE_LEVELS)),
            "with `--logit_mean`, `--logit_std`, `--mode_scale`",
        ),
        "noising_bias noising_weight timestep_shift": Translated(
            "weighting_scheme", lambda value: None, "`timestep_shift` is `--flow_shift`"
        ),
        "dynamic_timestep_shifting": Translated("shift_timesteps", lambda value: None),
        "force_v_prediction force_epsilon_prediction "
        "rescale_noise_scheduler_to_zero_terminal_snr": Ignored(
            "it is read from the base's scheduler"
        ),
        "resolution": Translated(
            convert=lambda value: split_resolutions(map(convert_resolution, str(value).split(","))),
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
            "stream_blocks", convert_offload_share, "with the same `--streamed_share`"
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
    r"loss_weight_strength|text_encoder\w*|huber_delta|vb_loss_strength|"
    r"samples?|concepts?|.*_gradient_reduce\w*|lora|async|attention|dataloader|train_device|temp|"
    r"fallback|enable_|only_cache|frames|loss_scaler|clear_|ema_|custom_|scheduler_params|device|"
    r"force_circular|fused|gradient_reduce|bundle|preserve|layer_filter_regex|weight_dtype)"
    r"[\w.]*"
)
"""Keys that say nothing of a LoRA of the denoiser, or that belong to another key."""


def matches_file(content: Mapping[str, Any]) -> bool:
    """Return whether the content is that of a preset or a saved configuration."""
    return "training_method" in content or {"base_model_name", "model_type"} <= content.keys()


def read_values(
    content: Mapping[str, Any], translation: Translation
) -> tuple[dict[str, Any], Datasets]:
    """Return the values and the concepts that are switched on, without parts that have no effect.

    Raises UserError for a file of concepts or samples that is there and cannot be read.
    """
    flat = flatten_values(content)
    concepts = read_list(flat.pop("concepts", None), flat.pop("concept_file_name", None))
    samples = read_list(flat.pop("samples", None), flat.pop("sample_definition_file_name", None))
    prompts = [str(item.get("prompt", "")) for item in samples if item.get("enabled", True)]
    if any(prompts):
        translation.set_values({"validation_prompt": list(filter(None, prompts))}, "samples")

    # Parts without effect are counted, as a saved configuration has hundreds.
    rows = dict(list_rows(TABLE))
    idle = [key for key in flat if key not in rows and PARTS_WITHOUT_EFFECT.fullmatch(key)]
    if idle:
        parts = ", ".join(dict.fromkeys(key.partition(".")[0] for key in idle))
        translation.ignore(f"{len(idle)} keys of {parts}", "they are not of this adapter")
    values = {key: value for key, value in flat.items() if key in rows or key not in idle}
    return values, list(list_datasets(concepts))


def read_list(items: Any, file_name: Any) -> list[dict[str, Any]]:
    """Return the items that stand in the configuration, or else in the file that it names. Raises
    UserError for a file that is there and cannot be read."""
    if not items and file_name and os.path.isfile(str(file_name)):
        items = read_json(Path(str(file_name)), list)
    return list_mappings(items)


def read_prompt(path: Any) -> str | None:
    """Return the first line of a file of prompts; None without the file."""
    is_file = os.path.isfile(str(path))
    return read_small_text(Path(path)).strip().partition("\n")[0] if is_file else None


def list_datasets(
    concepts: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the concepts that are switched on, and whether their images are those of the class."""
    for concept in concepts:
        values = flatten_values(concept)
        kind = values.pop("type", "STANDARD")
        if values.pop("enabled", True) and kind != "VALIDATION":
            yield values, kind == "PRIOR_PREDICTION"


def complete_settings(translation: Translation, values: dict[str, Any]) -> None:
    """Store what depends on several keys."""
    settings = translation.settings
    if "snr_gamma" in settings:
        settings["snr_gamma"] = read_number(values, "loss_weight_strength", 5.0)

    # Layers, and noise levels, by the family
    model_type = str(values.get("model_type"))
    family = next((name for key, name in FAMILIES.items() if model_type.startswith(key)), None)
    presets = BLOCKS | FILTER_PRESETS.get(str(family), {})
    preset = str(values.get("layer_filter_preset") or "full")
    translation.add_defaults({"target_modules": presets.get(preset, presets["full"])})
    weight = read_number(values, "noising_weight", 0.0)
    scheme = NOISE_LEVELS.get(str(values.get("timestep_distribution")), "none")
    is_dynamic = values.get("dynamic_timestep_shifting")
    set_noise_levels(
        translation,
        family,
        "timestep_distribution",
        scheme,
        mean=read_number(values, "noising_bias", 0.0),
        std=weight + 1.0,
        shift=None if is_dynamic else read_number(values, "timestep_shift", 1.0),
    )
    if settings.get("weighting_scheme") == "mode":
        settings["mode_scale"] = weight

    # Text encoders are trained where nothing is said; a first tag is kept where tags are shuffled.
    if family and FAMILIES_BY_NAME[family].adapted_encoders:
        translation.add_defaults({"train_text_encoder": True})
    if settings.get("shuffle_caption"):
        translation.add_defaults({"keep_tokens": 1})

    # A constant rate is warmed up too, by batches. Schedule-free optimizers have no schedule.
    translation.add_defaults({"lr_scheduler": SCHEDULES["CONSTANT"]})
    translation.add_defaults({"lr_warmup_steps": WARMUP_STEPS})
    settings["lr_warmup_steps"] //= settings.get("gradient_accumulation_steps", 1)
    if settings.get("optimizer") == "AdamWScheduleFree":
        settings |= {"lr_scheduler": "constant", "lr_warmup_steps": 0}


ONE_TRAINER = Trainer(
    name="OneTrainer",
    table=TABLE,
    dataset_table=CONCEPT_TABLE,
    matches=matches_file,
    read_values=read_values,
    complete=complete_settings,
    defaults=DEFAULTS,
)
