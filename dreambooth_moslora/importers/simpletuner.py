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
    if_true,
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
    "flux": {
        "": "black-forest-labs/FLUX.1-Krea-dev",
        "dev": "black-forest-labs/FLUX.1-dev",
        "kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    },
    "flux2": {
        "": "black-forest-labs/FLUX.2-klein-base-9B",
        "klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
        "dev": "black-forest-labs/FLUX.2-dev",
    },
    "z_image": {"": "Tongyi-MAI/Z-Image-Turbo", "base": "Tongyi-MAI/Z-Image"},
    "qwen_image": {
        "": "Qwen/Qwen-Image-2512",
        "v1.0": "Qwen/Qwen-Image",
        "edit-v1": "Qwen/Qwen-Image-Edit",
        "edit-v2": "Qwen/Qwen-Image-Edit-2509",
    },
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


LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
"""Layers that are adapted, unless a family or the file has others."""
FLUX_CONTEXT_LAYERS = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]
FLUX_FEED_FORWARDS = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
FLUX_LAYERS = {
    "all": [*LAYERS, *FLUX_CONTEXT_LAYERS],
    "all+ffs": [*LAYERS, *FLUX_CONTEXT_LAYERS, *FLUX_FEED_FORWARDS, "proj_mlp", "proj_out"],
    "context": FLUX_CONTEXT_LAYERS,
    "context+ffs": [*FLUX_CONTEXT_LAYERS, *FLUX_FEED_FORWARDS[2:]],
    "tiny": [f"single_transformer_blocks.{block}.proj_out" for block in (7, 20)],
    "nano": ["single_transformer_blocks.7.proj_out"],
}
"""`flux_lora_target` -> layers of FLUX.1."""
FAMILY_LAYERS = {
    "flux": FLUX_LAYERS["all"],
    "flux2": [*(f"attn.{name}" for name in LAYERS), "attn.to_qkv_mlp_proj"],
}


def convert_quantization(value: Any) -> str | None:
    """Return the nearest `base_quantization` of a precision such as `int8-quanto`."""
    text = str(value)
    if text.startswith("no"):
        return None
    return "nf4" if text.startswith(("int2", "int4", "nf4", "uint4")) else "int8"


def convert_module_names(value: Any) -> list[str]:
    """Return the names of a list, or of a comma-separated text."""
    return to_list(value.split(",") if isinstance(value, str) else value)


def read_prompt_library(value: Any) -> list[str]:
    """Return the prompts of a `user_prompt_library`, if it is there. Raises UserError."""
    entries = read_json(Path(str(value))).values() if os.path.isfile(str(value)) else ()
    texts = [entry.get("prompt") if isinstance(entry, Mapping) else entry for entry in entries]
    return list(map(str, filter(None, texts)))


CAPTION_STRATEGIES = dict.fromkeys(("textfile", "instanceprompt", "instance_prompt"))


def to_pixels(value: Any) -> int:
    """Return the side of the square in px; numbers below 8 are megapixels."""
    number = float(value)
    return convert_resolution(number if number >= 8 else math.sqrt(number) * 1000)


NO_COUNTERPART = Unsupported("there is no counterpart", (0.0,))
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
        "type": Unsupported("photos of a folder are read", ("local", "huggingface")),
        "image_column caption_column huggingface.dataset_name huggingface.image_column "
        "huggingface.caption_column huggingface.file_extension": Ignored(
            "it belongs to a dataset of the hub"
        ),
        "conditioning conditioning.type": Unsupported("photos are trained without others"),
        "conditioning.conditioning_type conditioning.captions conditioning.params "
        "conditioning.params.low_threshold conditioning.params.high_threshold": Ignored(
            "it belongs to photos of a condition"
        ),
        "max_num_samples start_epoch end_epoch timestep_sampling_offset": Unsupported(
            "all photos are trained all along", (1,)
        ),
        "slider_strength": Unsupported("sliders are not trained"),
        "caption_filter_list": Unsupported("captions are trained as they are"),
        "id cache_dir_vae cache_dir text_embeds minimum_image_size maximum_image_size "
        "target_downsample_size minimum_aspect_ratio maximum_aspect_ratio metadata_backend "
        "resolution_type skip_file_discovery preserve_data_backend_cache "
        "vae_cache_clear_each_epoch default write_batch_size disable_validation "
        "caption_shuffle.count caption_shuffle.seed caption_shuffle.split_on "
        "caption_shuffle.include_original vae_cache_ondemand vae_cache_disable hash_filenames "
        "text_encoder_batch_size text_cache_ondemand text_cache_disable disable_multiline_split "
        "metadata_update_interval delete_unwanted_images delete_problematic_images "
        "delete_nsfw_images max_upscale_threshold": Ignored(
            "photos are read and encoded in another way"
        ),
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
        "flux_lora_target": Translated(
            "target_modules", choose(FLUX_LAYERS), "`all` where it is silent"
        ),
        "base_model_precision": Translated("base_quantization", convert_quantization, "nearest"),
        "controlnet control controlnet_model_name_or_path": Unsupported(
            "photos are trained without control images"
        ),
        "pretrained_transformer_model_name_or_path pretrained_unet_model_name_or_path": Unsupported(
            "give the whole model as the base"
        ),
        "assistant_lora_strength": Unsupported("a companion has its full strength", (1, 1.0)),
        "disable_assistant_lora": Unsupported("remove assistant_lora_path"),
        "lora_init_type": Unsupported("there is no counterpart", ("default",)),
        "peft_lora_mode": Unsupported("there is no counterpart", ("standard",)),
        "slider_lora_target init_lora_ema layer_freeze_strategy": NO_COUNTERPART,
        "lycoris_config lora_format singlora_ramp_up_steps init_lokr_norm init_lora_step "
        "assistant_lora_inference_strength freeze_encoder_before freeze_encoder_after "
        "freeze_encoder_strategy": Ignored("it belongs to another key"),
        "prediction_type rescale_betas_zero_snr revision variant trust_remote_code vae_dtype "
        "pretrained_t5_model_name_or_path pretrained_gemma_model_name_or_path t5_padding "
        "qwen_text_encoder_model_name_or_path pretrained_transformer_subfolder "
        "pretrained_unet_subfolder base_model_default_dtype": Ignored("the base's own is used"),
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
        "offset_noise": Translated("noise_offset", lambda value: None, "with `noise_offset`"),
        "noise_offset noise_offset_probability": Ignored("it belongs to offset_noise"),
        "caption_dropout_probability": Translated("caption_dropout"),
        "flow_schedule_auto_shift": Translated(
            "shift_timesteps", lambda value: None, "with `flow_schedule_shift` 0"
        ),
        "flow_use_uniform_schedule": Translated(
            "weighting_scheme", lambda value: None, "`--weighting_scheme none`"
        ),
        "flow_use_beta_schedule use_soft_min_snr input_perturbation flow_custom_timesteps "
        "flow_cubic_schedule_weights tread_config diffusion_blocks_config distillation_method "
        "crepa_enabled urepa_enabled irepa_enabled twinflow_enabled internal_guidance_enabled "
        "diff2flow_enabled diff2flow_loss mixflow_enabled nextlat_enabled layersync_enabled "
        "xm_enabled scheduled_sampling_probability refiner_training optimizer_config sla_config "
        "quantization_config deepspeed_config fsdp_enable lr_scale lr_scale_sqrt": NO_COUNTERPART,
        "timestep_bias_strategy": Unsupported("all noise levels are equally likely", ("none",)),
        "distillation_config timestep_bias_begin timestep_bias_end timestep_bias_multiplier "
        "timestep_bias_portion flow_beta_schedule_alpha flow_beta_schedule_beta huber_c "
        "huber_schedule soft_min_snr_sigma_data input_perturbation_steps flow_timesteps_mode "
        "mixflow_gamma twinflow_target_step_count text_encoder_limit prodigy_steps": Ignored(
            "it belongs to a switch"
        ),
        "masked_loss_probability": Ignored("every exposure has the photo's mask"),
        "musubi_blocks_to_swap": Translated(
            "stream_blocks", lambda count: int(count) > 0 or None, "all blocks"
        ),
        "ramtorch enable_group_offload": Translated(
            "stream_blocks", if_true({"stream_blocks": True}), "all blocks"
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
        "output_dir logging_dir instance_prompt": Translated(),
        "only_instance_prompt": Unsupported("leave the caption files out of the folder"),
        "prepend_instance_prompt": Unsupported("name it in the dataset"),
        "checkpoint_step_interval checkpointing_steps": Translated("checkpointing_steps"),
        "checkpoints_total_limit": Translated(),
        "resume_from_checkpoint": Ignored("give --resume_from_checkpoint latest to resume"),
        "validation_prompt": Translated(),
        "validation_steps validation_step_interval": Translated("validation_steps", to_positive),
        "num_validation_images": Translated(),
        "report_to": Translated(),
        "push_to_hub hub_model_id": Translated(),
        "data_backend_config": Translated("instance_data_dir", lambda value: None, "is read"),
        "user_prompt_library": Translated(
            "validation_prompt", lambda value: None, "with the prompts of the file"
        ),
        "validation_prompt_library": Ignored("give prompts to --validation_prompt"),
        "num_eval_images validation_guidance validation_guidance_rescale validation_guidance_real "
        "validation_num_inference_steps validation_resolution validation_seed "
        "validation_negative_prompt validation_disable_unconditional validation_torch_compile "
        "validation_guidance_skip_layers validation_lycoris_strength validation_adapter_strength "
        "validation_epoch_interval validation_disable validation_on_startup validation_preview "
        "validation_noise_scheduler validation_method validation_randomize validation_seed_source "
        "validation_image_format validation_image_quality validation_using_datasets "
        "evaluation_type eval_steps_interval eval_epoch_interval eval_dataset_id eval_timesteps "
        "eval_loss_disable disable_benchmark": Ignored(
            "samples are generated with the base's usual steps"
        ),
        "aspect_bucket_rounding minimum_image_size resolution_type disable_bucket_pruning "
        "vae_batch_size write_batch_size compress_disk_cache strict_epoch_limit "
        "skip_file_discovery cache_dir cache_dir_vae cache_dir_text preserve_data_backend_cache "
        "vae_cache_ondemand vae_cache_disable vae_cache_scan_behaviour vae_enable_slicing "
        "vae_enable_tiling keep_vae_loaded text_cache_ondemand text_cache_disable "
        "text_encoder_batch_size read_batch_size image_processing_batch_size max_workers "
        "aspect_bucket_alignment aspect_bucket_disable_rebuild aspect_bucket_worker_count "
        "delete_problematic_images delete_unwanted_images dataloader_prefetch "
        "dataloader_prefetch_qlen ignore_missing_files metadata_update_interval "
        "conditioning_multidataset_sampling data_backend_sampling override_dataset_config "
        "allow_dataset_oversubscription disable_multiline_split target_downsample_size "
        "max_upscale_threshold caption_strategy": Ignored("photos are encoded once"),
        "quantize_via fuse_qkv_projections attention_mechanism dynamo_backend dynamo_mode "
        "dynamo_use_regional_compilation quantize_activations text_encoder_1_precision "
        "text_encoder_2_precision text_encoder_3_precision allow_tf32 enable_xformers "
        "sdnq_compile_mode sdnq_group_size sdnq_hadamard_group_size sdnq_use_hadamard "
        "sdnq_use_quantized_matmul musubi_block_swap_device group_offload_type "
        "group_offload_blocks_per_group group_offload_use_stream group_offload_to_disk_path "
        "ramtorch_target_modules ramtorch_text_encoder ramtorch_vae "
        "gradient_checkpointing_interval gradient_checkpointing_backend "
        "gradient_checkpointing_segment_stride "
        "gradient_checkpointing_offload_attention offload_during_startup offload_during_save "
        "delete_model_after_load unet_attention_slice set_grads_to_none gradient_precision "
        "fuse_optimizer optimizer_offload_gradients optimizer_release_gradients "
        "optimizer_cpu_offload_method disable_tf32 sageattention_usage find_unused_parameters "
        "dynamo_fullgraph dynamo_dynamic fully_unload_text_encoder torch_num_threads": Ignored(
            "--memory and --compile choose how steps are computed"
        ),
        "push_checkpoints_to_hub tracker_project_name tracker_run_name model_card_note ema_decay "
        "ema_update_interval ema_validation ema_device ema_cpu_only ema_foreach_disable "
        "ema_warmup_steps configs_dir i_know_what_i_am_doing disable_segmented_timestep_sampling "
        "training_scheduler_timestep_spacing inference_scheduler_timestep_spacing "
        "save_text_encoder checkpoint_epoch_interval checkpointing_rolling_steps "
        "checkpoints_rolling_total_limit webhook_config webhook_reporting_interval num_processes "
        "num_machines accelerate_config accelerate_extra_args main_process_ip main_process_port "
        "machine_rank same_network seed_for_each_device model_card_private "
        "model_card_safe_for_work modelspec_comment print_filenames print_sampler_statistics "
        "debug_aspect_buckets debug_dataset_loader disk_low_threshold disk_low_action "
        "disk_low_script accelerator_cache_clear_interval": Ignored(
            "it has no counterpart, and changes no weights"
        ),
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

    # Layers by the family; noise is offset where a switch is on.
    translation.add_defaults({"target_modules": FAMILY_LAYERS.get(name, LAYERS)})
    if values.get("offset_noise"):
        offset = read_number(values, "noise_offset", 0.1)
        translation.set_values({"noise_offset": offset}, "offset_noise")
    if values.get("grad_clip_method") != "norm":
        reason = "gradients are clipped by their norm, not each value"
        translation.ignore("grad_clip_method value", reason)

    prompts = read_prompt_library(values.get("user_prompt_library"))
    if prompts:
        prompts = [*to_list(translation.settings.get("validation_prompt")), *prompts]
        translation.set_values({"validation_prompt": prompts}, "user_prompt_library")

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
