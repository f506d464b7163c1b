"""Table of ostris' ai-toolkit: job files in YAML.

Names and defaults: `toolkit/config_modules.py` of ostris/ai-toolkit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.importers.converters import (
    CAPTION_SUFFIX_ROW,
    convert_optimizer,
    convert_precision,
    convert_resolution,
    convert_schedule,
    flatten_values,
    if_true,
    to_number,
    to_positive,
)
from dreambooth_moslora.importers.datasets import (
    complete_class_prompt,
    to_list,
    translate_datasets,
)
from dreambooth_moslora.importers.rows import (
    UNSET_VALUES,
    Ignored,
    Table,
    Translated,
    Translation,
    Unsupported,
    UnsupportedValueError,
)

TRAINER = "ai-toolkit"
DEFAULTS = {
    "mixer": "none",
    "rank": 4,
    "learning_rate": 1e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "optimizer": "AdamW",
    "adam_weight_decay": 0.01,
    "adam_weight_decay_text_encoder": 0.01,
    "max_train_steps": 1000,
    "train_batch_size": 1,
    "resolution": 512,
    "enable_bucket": True,
    "center_crop": True,
    "gradient_checkpointing": True,
    "instance_prompt_share": 0.0,
    "validation_steps": 100,
    "checkpointing_steps": 1000,
}
"""Settings of a job that says nothing of them. AdamW's weight decay is PyTorch's."""
PLACEHOLDER = "[trigger]"
"""Stands for the trigger word in captions and prompts."""


def convert_timestep_type(value: Any) -> dict[str, Any] | None:
    """Return how noise levels are drawn. Raises UnsupportedValueError."""
    kinds = {
        "sigmoid": {"weighting_scheme": "logit_normal"},
        "linear": {"weighting_scheme": "none"},
        "flux_shift": {"weighting_scheme": "none", "shift_timesteps": True},
    }
    if value not in kinds:
        raise UnsupportedValueError(f"one of {', '.join(kinds)} has a counterpart")
    return kinds[value]


def convert_quantization(value: Any) -> str | None:
    """Return the nearest `base_quantization` of a type such as `qfloat8` or `uint4`."""
    return (
        "nf4" if any(bits in str(value) for bits in ("int2", "int3", "int4", "uint4")) else "int8"
    )


def convert_sides(value: Any) -> list[int]:
    """Return the sides of one or several resolutions, px."""
    return [convert_resolution(side) for side in to_list(value)]


def convert_prompts(value: Any) -> list[str]:
    """Return the prompts of `prompts`, or of `samples` with further keys."""
    return [str(item["prompt"] if isinstance(item, Mapping) else item) for item in to_list(value)]


VIDEO_OR_CONTROL = Unsupported("photos are trained without control images and without video", (1,))
NO_COUNTERPART = Unsupported("there is no counterpart")
DATASET_TABLE: Table = {
    "Datasets": {
        "folder_path dataset_path": Translated("instance_data_dir"),
        "default_caption": Translated("instance_prompt", remark="for photos without a caption"),
        "caption_ext caption_type": CAPTION_SUFFIX_ROW,
        "caption_dropout_rate": Translated("caption_dropout", to_number),
        "shuffle_tokens": Translated("shuffle_caption"),
        "keep_tokens": Translated(convert=int),
        "resolution": Translated(convert=convert_sides, remark="one or several sides"),
        "buckets": Translated("enable_bucket"),
        "square_crop": Translated("enable_bucket", lambda value: not value),
        "random_crop": Translated("center_crop", lambda value: not value),
        "flip_x": Translated("random_flip"),
        "num_repeats": Translated("repeats", int),
        "cache_latents_to_disk": Translated("caching", if_true({"caching": "disk"})),
        "alpha_mask": Ignored("a photo's transparency is its mask"),
        "mask_min_value": Translated("unmasked_weight", to_number),
        "cache_latents cache_text_embeddings num_workers prefetch_factor cache_latents_num_workers "
        "bucket_tolerance load_image_when_caching_latents cache_tensors_to_disk": (
            Ignored("photos and prompts are encoded once")
        ),
        "mask_path": Unsupported("a mask lies beside its photo, as `dog.mask.png`"),
        "invert_mask flip_y augments augmentations random_scale token_dropout_rate "
        "random_triggers replacements standardize_images use_short_captions": NO_COUNTERPART,
        "loss_multiplier network_weight scale": Unsupported("all photos count equally", (1, 1.0)),
        "control_path control_path_1 control_path_2 control_path_3 inpaint_path "
        "unconditional_path clip_image_path num_frames do_i2v control_from_same_folder": (
            VIDEO_OR_CONTROL
        ),
        "type": Unsupported("photos alone are trained", ("image",)),
        "shrink_video_to_frames fps full_size_control_images replay_transforms guidance_type": (
            Ignored("it belongs to video or control images")
        ),
    }
}
TABLE: Table = {
    "Adapter": {
        "network.type": Unsupported("LoRA is the only kind of adapter here", ("lora",)),
        "network.linear network.rank": Translated("rank", int),
        "network.linear_alpha network.alpha": Translated("lora_alpha", to_number),
        "network.dropout": Translated("lora_dropout", to_number),
        "network.conv network.conv_alpha": Unsupported("use --rank_pattern *conv*=N"),
        "network.pretrained_lora_path": Translated("init_adapter"),
        "network.network_kwargs.only_if_contains": Translated("target_modules", to_list),
        "network.network_kwargs.ignore_if_contains network.lorm network.all_layers": NO_COUNTERPART,
        "network.transformer_only": Ignored("layers of the blocks are adapted"),
        "network.lokr_full_rank network.lokr_factor network.old_lokr_format "
        "network.split_multistage_loras network.layer_offloading": Ignored(
            "it belongs to another kind of adapter"
        ),
    },
    "Training": {
        "train.steps": Translated("max_train_steps", int),
        "train.batch_size": Translated("train_batch_size", int),
        "train.gradient_accumulation train.gradient_accumulation_steps": Translated(
            "gradient_accumulation_steps", int
        ),
        "train.lr train.unet_lr": Translated("learning_rate", to_number),
        "train.text_encoder_lr": Translated(convert=to_number),
        "train.train_text_encoder": Translated("train_text_encoder"),
        "train.train_unet": Unsupported("the denoiser is always trained", (True,)),
        "train.optimizer": Translated("optimizer", convert_optimizer),
        "train.optimizer_params.weight_decay": Translated("adam_weight_decay", to_number),
        "train.lr_scheduler": Translated(convert=convert_schedule),
        "train.lr_scheduler_params.num_warmup_steps": Translated("lr_warmup_steps", int),
        "train.max_grad_norm": Translated("max_grad_norm", to_number),
        "train.gradient_checkpointing": Translated(),
        "train.dtype": Translated("mixed_precision", convert_precision),
        "train.timestep_type": Translated("weighting_scheme", convert_timestep_type),
        "train.linear_timesteps train.linear_timesteps2": Unsupported(
            "errors are not weighed by ai-toolkit's bell curve"
        ),
        "train.content_or_style": Unsupported("all noise levels are drawn alike", ("balanced",)),
        "train.min_snr_gamma train.snr_gamma": Translated("snr_gamma", to_positive),
        "train.noise_offset": Translated(convert=to_number),
        "train.loss_type": Unsupported("the loss is the mean squared error", ("mse",)),
        "train.reg_weight": Translated("prior_loss_weight", to_number),
        "train.noise_scheduler": Ignored("it is the base's own"),
        "train.diff_output_preservation train.blank_prompt_preservation": Translated(
            "prior",
            if_true({"with_prior_preservation": True, "prior": "adapter_off"}),
            "the nearest: the class prompt, with the adapter off",
        ),
        "train.diff_output_preservation_class": Translated(
            "class_prompt", lambda value: f"a photo of a {value}" if value else None
        ),
        "train.diff_output_preservation_multiplier train.blank_prompt_preservation_multiplier": (
            Translated("prior_loss_weight", to_number)
        ),
        "train.ema_config.use_ema": Ignored(
            "the last weights are published; --optimizer AdamWScheduleFree averages its steps"
        ),
        "train.ema_config.ema_decay": Ignored("it belongs to use_ema"),
        "train.min_denoising_steps train.max_denoising_steps": Unsupported(
            "all noise levels are drawn", (0, 999, 1000)
        ),
        "train.prompt_dropout_prob": Translated("caption_dropout", to_number),
        "train.bypass_guidance_embedding": Translated(
            "guidance_scale",
            if_true({"guidance_scale": 1.0}),
            "the nearest: the base is told a guidance of 1",
        ),
        "train.xformers train.sdp train.attention_backend train.unload_text_encoder "
        "train.cache_text_embeddings train.force_first_sample": Ignored(
            "PyTorch's own attention is used, and prompts are encoded once"
        ),
        "train.skip_first_sample": Ignored("samples are generated before the first step"),
        "train.disable_sampling": Translated(
            "num_validation_images", if_true({"num_validation_images": 0})
        ),
    },
    "Model": {
        "model.name_or_path": Translated("pretrained_model_name_or_path"),
        "model.quantize": Translated("base_quantization", if_true({"base_quantization": "int8"})),
        "model.qtype": Translated("base_quantization", convert_quantization, "the nearest"),
        "model.assistant_lora_path": Translated(
            "companion", remark="lies under the adapter in training, as ostris' training adapter"
        ),
        "model.layer_offloading model.auto_memory": Translated("stream_blocks"),
        "model.vae_path": Translated("pretrained_vae_model_name_or_path"),
        "model.lora_path": Unsupported("merge it into the base first"),
        "model.compile model.block_compile": Translated("compile", if_true({"compile": "on"})),
        "model.arch model.is_flux model.is_xl model.is_v3 model.is_v2 model.is_pixart "
        "model.is_lumina2 model.is_auraflow": Ignored("it is read from the base"),
        "model.quantize_te model.qtype_te model.low_vram model.te_name_or_path "
        "model.extras_name_or_path model.layer_offloading_transformer_percent "
        "model.layer_offloading_text_encoder_percent model.model_kwargs model.dtype "
        "model.attn_masking model.split_model_over_gpus model.accuracy_recovery_adapter": Ignored(
            "encoders leave the GPU when they are not used, and --memory chooses the rest"
        ),
    },
    "Samples and files": {
        "name": Translated("output_dir", remark="in `training_folder`"),
        "training_folder": Translated("output_dir"),
        "trigger_word": Translated("instance_prompt", remark="and before captions that lack it"),
        "sample.sample_every": Translated("validation_steps", int),
        "sample.prompts sample.samples": Translated("validation_prompt", convert_prompts),
        "sample.sampler sample.width sample.height sample.neg sample.seed sample.walk_seed "
        "sample.guidance_scale sample.sample_steps sample.sample_start_step sample.format "
        "sample.num_frames sample.fps sample.network_multiplier sample.guidance_rescale": Ignored(
            "samples are generated with the base's usual steps and guidance at fixed seeds"
        ),
        "save.save_every": Translated("checkpointing_steps", int),
        "save.max_step_saves_to_keep": Translated("checkpoints_total_limit", int),
        "save.push_to_hub": Translated("push_to_hub"),
        "save.hf_repo_id": Translated("hub_model_id"),
        "save.dtype save.save_format save.hf_private": Ignored(
            "the adapter is saved in its own precision; an uploaded repository is private"
        ),
        "device performance_log_every type sqlite_db_path": Ignored(
            "a GPU is used if there is one"
        ),
        "logging.log_every logging.use_ui_logger logging.verbose logging.project_name "
        "logging.run_name": Ignored("metrics.jsonl has a line for each step"),
        "logging.use_wandb": Translated("report_to", if_true({"report_to": "wandb"})),
    },
}


def matches_file(content: Mapping[str, Any]) -> bool:
    """Return whether the content is that of a job file."""
    config = content.get("config")
    return "job" in content and isinstance(config, Mapping) and "process" in config


def translate_config(content: Mapping[str, Any]) -> Translation:
    """Return the settings of a job: of its first process that trains."""
    translation = Translation(TRAINER)
    process = dict(to_list(content["config"]["process"])[0])
    if content["job"] != "extension" or "train" not in process:
        translation.unsupported.append(f"job {content['job']}: training jobs alone are read")
        return translation

    # The values, without what is read apart: datasets, and what belongs to a switch that is off
    datasets = to_list(process.pop("datasets", None))
    values = {"name": content["config"].get("name")} | flatten_values(process)
    folder, trigger = values.pop("training_folder", None), values.get("trigger_word")
    drop_idle_values(values)
    translation.translate_values(TABLE, values)
    if values.get("name"):
        path = Path(folder or "output") / str(values["name"])
        translation.set_values({"output_dir": str(path)}, "training_folder, name")
    split = []
    for dataset in datasets:
        values = dict(dataset)
        is_class = values.pop("is_reg", False) or values.pop("prior_reg", False)
        split.append((values, bool(is_class)))
    translate_datasets(translation, DATASET_TABLE, split)
    set_trigger(translation, trigger)
    complete_class_prompt(translation)
    settings = translation.settings
    if "lora_alpha" not in settings:
        settings["lora_alpha"] = 1.0
    if "adam_weight_decay" in settings:
        settings["adam_weight_decay_text_encoder"] = settings["adam_weight_decay"]
    translation.add_defaults(DEFAULTS)
    return translation


def drop_idle_values(values: dict[str, Any]) -> None:
    """Remove the values of switches that are off, which belong to no effect."""
    if not values.get("model.quantize"):
        values.pop("model.qtype", None)
    for name in ("train.diff_output_preservation", "train.blank_prompt_preservation"):
        if values.get(name) in UNSET_VALUES:
            values.pop(f"{name}_multiplier", None)
            values.pop(f"{name}_class", None)


def set_trigger(translation: Translation, trigger: str | None) -> None:
    """Put the trigger word into prompts and before captions, as ai-toolkit does."""
    settings = translation.settings
    if trigger:
        settings["token"] = trigger
        settings["caption_prefix"] = trigger
    settings["instance_prompt"] = str(settings.get("instance_prompt") or trigger or "")
    for name in ("instance_prompt", "validation_prompt"):
        if settings.get(name) and trigger:
            texts = [text.replace(PLACEHOLDER, trigger) for text in to_list(settings[name])]
            settings[name] = texts if name == "validation_prompt" else texts[0]
