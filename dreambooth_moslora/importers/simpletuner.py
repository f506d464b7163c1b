"""Table of SimpleTuner: `config.json` with its `multidatabackend.json`.

Names and defaults: `simpletuner_sdk/server/services/field_registry`, `helpers/models` and
`documentation/DATALOADER.md` of bghira/SimpleTuner.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.importers.converters import (
    AVERAGE_ROW,
    CLIPPING_ROW,
    choose,
    convert_optimizer,
    convert_precision,
    convert_resolution,
    flatten_values,
    read_number,
    to_positive,
)
from dreambooth_moslora.importers.datasets import list_mappings, to_list
from dreambooth_moslora.importers.families import set_noise_levels
from dreambooth_moslora.importers.rows import (
    Ignored,
    Table,
    Translated,
    Translation,
    Unsupported,
    format_pair,
)
from dreambooth_moslora.importers.trainer import Datasets, Trainer

DEFAULTS = {
    "rank": 16,
    "lora_dropout": 0.1,
    "learning_rate": 4e-7,
    "lr_scheduler": "constant_with_warmup",
    "adam_epsilon": 1e-6,
    "max_grad_norm": 2.0,
    "mixed_precision": "bf16",
    "train_batch_size": 4,
    "gradient_checkpointing": True,
    "checkpoints_total_limit": 5,
    "caption_dropout": 0.1,
    "caching": "disk",
    "resolution": 1024,
}
SCHEDULES = {
    name: name for name in ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
}
"""`lr_scheduler` -> ours. `cosine_with_restarts` keeps the rate constant there."""
CLASS_KEYS = ("is_regularisation_data", "is_regularization_data")
FAMILIES = {"sd1x": "sd1"}
"""`model_family` -> family, where it has another name here."""
HUB_IDS = {
    "flux": {"": "black-forest-labs/FLUX.1-Krea-dev", "dev": "black-forest-labs/FLUX.1-dev"},
    "flux2": {
        "": "black-forest-labs/FLUX.2-klein-base-9B",
        "klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
        "dev": "black-forest-labs/FLUX.2-dev",
    },
    "z_image": {"": "Tongyi-MAI/Z-Image-Turbo", "base": "Tongyi-MAI/Z-Image"},
    "qwen_image": {"": "Qwen/Qwen-Image-2512", "v1.0": "Qwen/Qwen-Image"},
    "anima": {
        "": "CalamitousFelicitousness/Anima-Preview-3-sdnext-diffusers",
        "release": "circlestone-labs/Anima-Base-v1.0-Diffusers",
        "base-v1.0": "circlestone-labs/Anima-Base-v1.0-Diffusers",
    },
    "krea2": {"": "krea/Krea-2-Raw", "turbo": "krea/Krea-2-Turbo"},
    "lumina2": {"": "Alpha-VLLM/Lumina-Image-2.0"},
    "sana": {
        "": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
        "sana1.0-1.6b-1024": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    },
    "sd3": {
        "": "stabilityai/stable-diffusion-3.5-medium",
        "large": "stabilityai/stable-diffusion-3.5-large",
    },
    "sd1x": {
        "": "Lykon/dreamshaper-8",
        "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    },
    "sdxl": {"": "stabilityai/stable-diffusion-xl-base-1.0"},
}
"""`model_family` -> {`model_flavour`: hub id}; "" is any other flavour, and none."""


def convert_quantization(value: Any) -> str | None:
    """Return the nearest `base_quantization` of a precision such as `int8-quanto`."""
    text = str(value)
    if text.startswith("no"):
        return None
    return "nf4" if text.startswith(("int2", "int4", "nf4", "uint4")) else "int8"


def convert_module_names(value: Any) -> list[str]:
    """Return the names of a list, or of a comma-separated text."""
    return to_list(value.split(",") if isinstance(value, str) else value)


CAPTION_STRATEGIES = dict.fromkeys(("textfile", "instanceprompt", "instance_prompt"))


def to_pixels(value: Any) -> int:
    """Return the side of the square in px; numbers below 8 are megapixels."""
    number = float(value)
    return convert_resolution(number if number >= 8 else math.sqrt(number) * 1000)


DATASET_TABLE: Table = {
    "Datasets": {
        "instance_data_dir": Translated(),
        "instance_prompt": Translated(),
        "repeats": Translated(convert=lambda value: int(value) + 1, remark="one more than there"),
        "resolution": Translated(convert=to_pixels, remark="px, or megapixels"),
        "crop_style": Translated(
            "center_crop", lambda value: value in ("center", "centre"), "`random` or `center`"
        ),
        "crop_aspect": Translated("enable_bucket", lambda value: value != "square"),
        "crop": Ignored("photos are cropped to the shape that they are trained in"),
        "caption_strategy": Translated("captions", choose(CAPTION_STRATEGIES)),
        "only_instance_prompt": Unsupported("leave the caption files out of the folder"),
        "caption_prefix": Translated(remark="with `prepend_instance_prompt`"),
        "caption_shuffle.enable": Translated("shuffle_caption"),
        "caption_shuffle.position_start": Translated("keep_tokens"),
        "probability": Unsupported("all photos are shown equally often", (1, 1.0)),
        "dataset_name": Unsupported(
            "download it (`hf download NAME --repo-type dataset --local-dir photos`) and name its "
            "folder"
        ),
        "conditioning_data conditioning_type": Unsupported("photos are trained without others"),
        "id type cache_dir_vae cache_dir text_embeds minimum_image_size maximum_image_size "
        "target_downsample_size minimum_aspect_ratio maximum_aspect_ratio metadata_backend "
        "resolution_type skip_file_discovery preserve_data_backend_cache "
        "vae_cache_clear_each_epoch default write_batch_size disable_validation "
        "caption_shuffle.count caption_shuffle.seed caption_shuffle.split_on "
        "caption_shuffle.include_original": Ignored("photos are read and encoded in another way"),
    }
}
TABLE: Table = {
    "Model and adapter": {
        "pretrained_model_name_or_path": Translated(),
        "pretrained_vae_model_name_or_path": Translated(),
        "model_family model_flavour": Translated(
            "pretrained_model_name_or_path", lambda value: None, "the id of that family"
        ),
        "model_type": Unsupported("LoRA is the only kind of adapter here", ("lora",)),
        "lora_type": Unsupported("LoRA is the only kind of adapter here", ("standard",)),
        "lora_rank": Translated("rank"),
        "lora_alpha": Translated(),
        "lora_dropout": Translated(),
        "use_dora": Translated(),
        "peft_lora_target_modules": Translated("target_modules", convert_module_names),
        "init_lora": Translated("init_adapter"),
        "assistant_lora_path": Translated("companion"),
        "base_model_precision": Translated("base_quantization", convert_quantization, "nearest"),
        "controlnet control": Unsupported("photos are trained without control images"),
    },
    "Training": {
        "train_batch_size gradient_accumulation_steps seed": Translated(),
        "max_train_steps num_train_epochs": Translated(convert=lambda value: int(value) or None),
        "learning_rate": Translated(),
        "lr_scheduler": Translated(convert=choose(SCHEDULES)),
        "lr_warmup_steps": Translated(
            remark="of `cosine` there it is half the period, and nothing is warmed up; here the "
            "rate falls once, over the whole run"
        ),
        "lr_end": Ignored("the rate falls to 0"),
        "lr_num_cycles": Translated(),
        "lr_power": Translated(),
        "optimizer": Translated(convert=convert_optimizer),
        "adam_beta1 adam_beta2 adam_weight_decay adam_epsilon": Translated(),
        "optimizer_beta1": Translated("adam_beta1"),
        "optimizer_beta2": Translated("adam_beta2"),
        "max_grad_norm": CLIPPING_ROW,
        "grad_clip_method": Unsupported("gradients are clipped by their norm", ("norm", "value")),
        "train_text_encoder": Translated(),
        "text_encoder_lr": Translated(),
        "snr_gamma": Translated(convert=to_positive),
        "loss_type": Unsupported("the loss is the mean squared error", ("l2",)),
        "noise_offset": Translated(),
        "caption_dropout_probability": Translated("caption_dropout"),
        "flow_schedule_auto_shift": Translated(
            "shift_timesteps", lambda value: None, "with `flow_schedule_shift` 0"
        ),
        "flow_use_uniform_schedule": Translated(
            "weighting_scheme", lambda value: None, "`--weighting_scheme none`"
        ),
        "flow_use_beta_schedule use_soft_min_snr input_perturbation": Unsupported(
            "there is no counterpart", (0.0,)
        ),
        "flow_schedule_shift": Translated("flow_shift", lambda value: None, "3 if it is silent"),
        "flow_sigmoid_scale": Translated("logit_std", lambda value: None),
        "use_ema": AVERAGE_ROW,
        "gradient_checkpointing": Translated(),
        "mixed_precision": Translated(convert=convert_precision),
        "resolution": Translated(convert=to_pixels),
        "tokenizer_max_length": Translated("max_sequence_length"),
    },
    "Files and samples": {
        "output_dir": Translated(),
        "checkpoint_step_interval checkpointing_steps": Translated("checkpointing_steps"),
        "checkpoints_total_limit": Translated(),
        "resume_from_checkpoint": Ignored("give --resume_from_checkpoint latest to resume"),
        "validation_prompt": Translated(),
        "validation_steps validation_step_interval": Translated("validation_steps", to_positive),
        "num_validation_images": Translated(),
        "report_to": Translated(),
        "push_to_hub hub_model_id": Translated(),
        "data_backend_config": Translated("instance_data_dir", lambda value: None, "is read"),
        "validation_prompt_library user_prompt_library": Unsupported(
            "give the prompts to --validation_prompt"
        ),
        "num_eval_images validation_guidance validation_guidance_rescale validation_guidance_real "
        "validation_num_inference_steps validation_resolution validation_seed "
        "validation_negative_prompt validation_disable_unconditional validation_torch_compile "
        "validation_guidance_skip_layers validation_lycoris_strength validation_adapter_strength "
        "disable_benchmark": Ignored("samples are generated with the base's usual steps"),
        "aspect_bucket_rounding minimum_image_size resolution_type disable_bucket_pruning "
        "vae_batch_size write_batch_size compress_disk_cache strict_epoch_limit "
        "skip_file_discovery cache_dir cache_dir_vae cache_dir_text preserve_data_backend_cache "
        "caption_strategy": Ignored("photos are encoded once"),
        "quantize_via fuse_qkv_projections attention_mechanism dynamo_backend dynamo_mode "
        "dynamo_use_regional_compilation quantize_activations text_encoder_1_precision "
        "text_encoder_2_precision text_encoder_3_precision allow_tf32 enable_xformers "
        "sdnq_compile_mode sdnq_group_size sdnq_hadamard_group_size sdnq_use_hadamard "
        "sdnq_use_quantized_matmul": Ignored(
            "--memory and --compile choose how steps are computed"
        ),
        "push_checkpoints_to_hub tracker_project_name tracker_run_name model_card_note "
        "ema_decay": Ignored("it has no counterpart, and changes no weights"),
    },
}


def matches_file(content: Mapping[str, Any]) -> bool:
    """Return whether the content is that of a `config.json`."""
    names = {str(name).lstrip("-") for name in content}
    return bool(names & {"data_backend_config", "model_family", "base_model_precision"})


def read_values(
    content: Mapping[str, Any], translation: Translation
) -> tuple[dict[str, Any], Datasets]:
    """Return the values and the datasets of images. Raises UserError for a file of datasets that
    cannot be read."""
    values = {str(name).lstrip("-").replace("-", "_"): value for name, value in content.items()}
    path = values.get("data_backend_config")
    if path and not os.path.isfile(str(path)):
        translation.unknown.append(f"data_backend_config {path} (no such file)")
        path = None
    backends = read_json(Path(str(path)), list) if path else []
    datasets = list(list_datasets(translation, backends))
    if values.get("instance_prompt"):
        translation.set_values({"instance_prompt": str(values["instance_prompt"])}, "")
    return values, datasets


def list_datasets(
    translation: Translation, backends: list[Any]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the datasets of images, and whether they are those of the class; report the others."""
    for backend in list_mappings(backends):
        kind = backend.get("dataset_type", "image")
        if kind in ("text_embeds", "image_embeds") or backend.get("disabled"):
            continue
        if kind != "image":
            translation.unsupported.append(f"dataset_type {kind}: photos alone are trained")
            continue
        values = flatten_values(backend)
        if values.pop("prepend_instance_prompt", False):
            values["caption_prefix"] = values.get("instance_prompt")
        is_class = [values.pop(name, False) for name in CLASS_KEYS]
        yield values, any(is_class)


def complete_settings(translation: Translation, values: dict[str, Any]) -> None:
    """Store what depends on several keys."""
    name = str(values.get("model_family"))
    flavours = HUB_IDS.get(name)
    if flavours and not values.get("pretrained_model_name_or_path"):
        hub_id = flavours.get(str(values.get("model_flavour")), flavours[""])
        translation.set_values({"pretrained_model_name_or_path": hub_id}, "model_family")

    # A cosine has no warm-up there.
    if translation.settings.get("lr_scheduler") == "cosine":
        steps = translation.settings.pop("lr_warmup_steps", 0)
        if steps:
            reason = "half the period of the cosine; here the rate falls once, over the whole run"
            translation.ignore(format_pair("lr_warmup_steps", steps), reason)

    # A shift of 0 is none, or that of the base by the picture's size.
    shift = read_number(values, "flow_schedule_shift", 3.0)
    by_size = shift <= 0 and values.get("flow_schedule_auto_shift")
    set_noise_levels(
        translation,
        FAMILIES.get(name, name),
        "flow_schedule_shift",
        "none" if values.get("flow_use_uniform_schedule") else "logit_normal",
        std=read_number(values, "flow_sigmoid_scale", 1.0),
        shift=None if by_size else shift if shift > 0 else 1.0,
    )


SIMPLE_TUNER = Trainer(
    name="SimpleTuner",
    table=TABLE,
    dataset_table=DATASET_TABLE,
    matches=matches_file,
    read_values=read_values,
    complete=complete_settings,
    defaults=DEFAULTS,
)
