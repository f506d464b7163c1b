"""Table of ostris' ai-toolkit: job files in YAML.

Names and defaults: `toolkit/config_modules.py` of ostris/ai-toolkit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.importers.converters import (
    AVERAGE_ROW,
    CAPTION_SUFFIX_ROW,
    CLIPPING_ROW,
    choose,
    convert_optimizer,
    convert_precision,
    convert_resolution,
    flatten_values,
    if_true,
    to_positive,
)
from dreambooth_moslora.importers.datasets import list_mappings, split_resolutions, to_list
from dreambooth_moslora.importers.families import (
    adapt_convolutions,
    set_block_layers,
    set_noise_levels,
)
from dreambooth_moslora.importers.rows import (
    UNSET_VALUES,
    Ignored,
    Table,
    Translated,
    Translation,
    Unsupported,
)
from dreambooth_moslora.importers.trainer import Datasets, Trainer

DEFAULTS = {
    "rank": 4,
    "lora_alpha": 1.0,
    "learning_rate": 1e-6,
    "text_encoder_lr": 0.0,
    "lr_scheduler": "constant",
    "adam_epsilon": 1e-6,
    "max_train_steps": 1000,
    "train_batch_size": 1,
    "resolution": 512,
    "enable_bucket": True,
    "gradient_checkpointing": True,
    "mixed_precision": "no",
    "validation_steps": 100,
    "checkpointing_steps": 1000,
    "checkpoints_total_limit": 5,
}
PLACEHOLDER = "[trigger]"


FAMILIES = {
    **dict.fromkeys(("sd1", "sdxl", "flux", "qwen_image", "krea2", "lumina2", "anima"), None),
    "sd15": "sd1",
    "is_xl": "sdxl",
    "is_flux": "flux",
    "flux_kontext": "flux",
    **dict.fromkeys(("qwen_image_edit", "qwen_image_edit_plus"), "qwen_image"),
    "sd3": "sd3",
    "is_v3": "sd3",
    "is_lumina2": "lumina2",
    **dict.fromkeys(("flux2", "flux2_klein_4b", "flux2_klein_9b"), "flux2"),
    "zimage": "z_image",
}
"""`arch`, or the older switch of a model -> family; None for the same name."""
NOISE_LEVELS: dict[str, dict[str, Any]] = {
    "sigmoid": {"scheme": "logit_normal"},
    "linear": {},
    **{name: {"shift": None} for name in ("shift", "flux_shift", "lumina2_shift")},
    # All levels are drawn alike there, and their errors weighed by a table. Levels that are drawn
    # as often as they weigh have the same mean gradient: this is the nearest such distribution.
    "weighted": {"scheme": "logit_normal", "mean": 0.5, "std": 1.55},
}
"""`timestep_type` -> arguments of `set_noise_levels`."""
SCHEDULES = {name: name for name in ("constant", "constant_with_warmup", "cosine")}
SCHEDULES["cosine_with_restarts"] = "cosine"
"""`lr_scheduler` -> ours. There is one cycle; `linear` rises there."""
UNET_FAMILIES = ("sd1", "sdxl")
COUNTS_OF_STEPS = ("max_train_steps", "lr_warmup_steps", "validation_steps", "checkpointing_steps")


def convert_quantization(value: Any) -> str | None:
    """Return the nearest `base_quantization` of a type such as `qfloat8` or `uint4`."""
    return (
        "nf4" if any(bits in str(value) for bits in ("int2", "int3", "int4", "uint4")) else "int8"
    )


def convert_sides(value: Any) -> dict[str, Any]:
    """Return the settings of one or several resolutions, px."""
    return split_resolutions(map(convert_resolution, to_list(value)))


def convert_prompts(value: Any) -> list[str]:
    """Return the prompts of `prompts`, or of `samples` with further keys."""
    prompts = [item.get("prompt") if isinstance(item, Mapping) else item for item in to_list(value)]
    return list(map(str, filter(None, prompts)))


VIDEO_OR_CONTROL = Unsupported("photos are trained without control images and without video", (1,))
NO_COUNTERPART = Unsupported("there is no counterpart")
DATASET_TABLE: Table = {
    "Datasets": {
        "folder_path dataset_path": Translated("instance_data_dir"),
        "default_caption": Translated("instance_prompt", remark="for photos without a caption"),
        "caption_ext caption_type": CAPTION_SUFFIX_ROW,
        "caption_dropout_rate": Translated("caption_dropout"),
        "shuffle_tokens": Translated("shuffle_caption"),
        "keep_tokens": Translated(),
        "resolution": Translated(convert=convert_sides, remark="one or several sides"),
        "buckets": Translated("enable_bucket"),
        "square_crop": Translated("enable_bucket", lambda value: not value),
        "random_crop": Translated("center_crop", lambda value: not value),
        "flip_x": Translated("random_flip"),
        "num_repeats": Translated("repeats"),
        "batch_size": Translated("train_batch_size"),
        "cache_latents_to_disk": Translated("caching", if_true({"caching": "disk"})),
        "alpha_mask": Ignored("a photo's transparency is its mask"),
        "mask_min_value": Translated("unmasked_weight"),
        "cache_latents cache_text_embeddings num_workers prefetch_factor cache_latents_num_workers "
        "bucket_tolerance load_image_when_caching_latents cache_tensors_to_disk": (
            Ignored("photos and prompts are encoded once")
        ),
        "mask_path": Unsupported("a mask lies beside its photo, as `dog.mask.png`"),
        "invert_mask flip_y augments augmentations random_scale token_dropout_rate "
        "random_triggers replacements standardize_images use_short_captions": NO_COUNTERPART,
        "loss_multiplier network_weight scale": Unsupported("all photos count equally", (1, 1.0)),
        "control_path control_path_1 control_path_2 control_path_3 inpaint_path "
        "unconditional_path clip_image_path num_frames do_i2v control_from_same_folder controls "
        "clip_image_from_same_folder auto_frame_count do_audio": VIDEO_OR_CONTROL,
        "type": Unsupported("photos alone are trained", ("image",)),
        "trigger_word": Unsupported(
            "one trigger word is for all folders: config.process.trigger_word"
        ),
        "diff_output_preservation extra_values poi": NO_COUNTERPART,
        "trim_auto_frame_count_tail num_controls_from_same_folder control_transparent_color debug "
        "cache_clip_vision_to_disk shuffle_augmentations clip_image_augmentations fps "
        "random_triggers_max clip_image_shuffle_augmentations fast_image_size guidance_type "
        "audio_preserve_pitch audio_normalize diff_output_preservation_class "
        "shrink_video_to_frames full_size_control_images replay_transforms": (
            Ignored("it belongs to video or control images")
        ),
    }
}
TABLE: Table = {
    "Adapter": {
        "network.type": Unsupported("LoRA is the only kind of adapter here", ("lora",)),
        "network.linear network.rank": Translated("rank"),
        "network.linear_alpha network.alpha": Translated("lora_alpha"),
        "network.dropout": Translated("lora_dropout"),
        "network.conv network.conv_alpha": Translated(
            "rank_pattern", lambda value: None, "a UNet's convolutions; transformers have none"
        ),
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
        "train.steps": Translated("max_train_steps"),
        "train.batch_size": Translated("train_batch_size"),
        "train.gradient_accumulation": Translated("gradient_accumulation_steps"),
        "train.gradient_accumulation_steps": Translated(
            remark="it counts batches as steps there: `steps` is divided by it"
        ),
        "train.lr train.unet_lr": Translated("learning_rate"),
        "train.text_encoder_lr": Translated(),
        "train.train_text_encoder": Translated("train_text_encoder"),
        "train.train_unet": Unsupported("the denoiser is always trained", (True,)),
        "train.optimizer": Translated("optimizer", convert_optimizer),
        "train.optimizer_params.weight_decay": Translated("adam_weight_decay"),
        "train.optimizer_params.betas": Translated(
            "adam_beta1", lambda betas: dict(zip(("adam_beta1", "adam_beta2"), betas))
        ),
        "train.optimizer_params.eps": Translated("adam_epsilon"),
        "train.optimizer_params.d_coef": Unsupported("Prodigy's step size is its own", (1, 1.0)),
        "train.lr_scheduler": Translated(convert=choose(SCHEDULES)),
        "train.lr_scheduler_params.num_warmup_steps": Translated("lr_warmup_steps"),
        "train.max_grad_norm": CLIPPING_ROW,
        "train.gradient_checkpointing": Translated(),
        "train.dtype": Translated("mixed_precision", convert_precision),
        "train.timestep_type": Translated(
            "weighting_scheme",
            choose(dict.fromkeys(NOISE_LEVELS)),
            "with `--flow_shift` or `--shift_timesteps`; `sigmoid` where it is silent; with "
            "`weighted` levels are drawn about as often as their errors weigh there",
        ),
        "train.linear_timesteps train.linear_timesteps2": Unsupported(
            "errors are not weighed by ai-toolkit's bell curve"
        ),
        "train.content_or_style": Unsupported("all noise levels are drawn alike", ("balanced",)),
        "train.min_snr_gamma train.snr_gamma": Translated("snr_gamma", to_positive),
        "train.noise_offset": Translated(),
        "train.loss_type": Unsupported("the loss is the mean squared error", ("mse",)),
        "train.reg_weight": Translated("prior_loss_weight"),
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
            Translated("prior_loss_weight")
        ),
        "train.ema_config.use_ema": AVERAGE_ROW,
        "train.ema_config.ema_decay": Ignored("it belongs to use_ema"),
        "train.min_denoising_steps train.max_denoising_steps": Unsupported(
            "all noise levels are drawn", (0, 999, 1000)
        ),
        "train.prompt_dropout_prob": Translated("caption_dropout"),
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
    "Training without a counterpart": {
        "train.learnable_snr_gos train.weight_jitter train.merge_network_on_save train.free_u "
        "train.start_step train.adapter_assist_name_or_path train.random_noise_multiplier "
        "train.do_signal_correction_noise train.do_batch_noise_correction train.train_turbo "
        "train.do_signal_amplification train.random_noise_shift train.negative_prompt "
        "train.adaptive_scaling_factor train.match_noise_norm train.short_and_long_captions "
        "train.single_item_batching train.match_adapter_assist train.match_adapter_chance "
        "train.inverted_mask_prior train.standardize_images train.standardize_latents "
        "train.dynamic_noise_offset train.do_cfg train.do_random_cfg train.correct_pred_norm "
        "train.t0_loss_target train.do_fft_loss train.prompt_saturation_chance "
        "train.do_prior_divergence train.target_norm_std train.do_paramiter_swapping "
        "train.latent_feature_extractor_path train.diffusion_feature_extractor_path "
        "train.force_consistent_noise train.blended_blur_noise train.do_guidance_loss "
        "train.do_differential_guidance train.do_blank_stabilization train.max_loss "
        "train.validation_config train.unconditional_prompt": NO_COUNTERPART,
        "train.noise_multiplier train.target_noise_multiplier train.img_multiplier "
        "train.noisy_latent_multiplier train.latent_multiplier train.pred_scaler "
        "train.optimal_noise_pairing_samples": Unsupported("there is no counterpart", (1, 1.0)),
        "train.loss_target": Unsupported("there is no counterpart", ("noise",)),
        "train.num_train_timesteps": Unsupported("there are 1000 noise levels", (1000,)),
        "train.refiner_lr train.embedding_lr train.adapter_lr train.train_refiner "
        "train.show_turbo_outputs train.merge_network_on_save_strength train.adapter_assist_type "
        "train.batch_noise_correction_scale train.signal_amplification_strength "
        "train.signal_correction_noise_scale train.max_negative_prompts train.cfg_scale "
        "train.short_and_long_captions_encoder_split train.inverted_mask_prior_multiplier "
        "train.max_cfg_scale train.cfg_rescale train.correct_pred_norm_multiplier "
        "train.t0_velocity_equiv_weight train.do_fft_velocity_equiv_weight "
        "train.target_norm_std_value train.next_sample_timesteps train.paramiter_swapping_factor "
        "train.latent_feature_loss_weight train.diffusion_feature_extractor_weight "
        "train.guidance_loss_target train.do_guidance_loss_cfg_zero train.guidance_loss_schedule "
        "train.differential_guidance_scale train.switch_boundary_every "
        "train.audio_loss_multiplier train.max_loss_debug": Ignored("it belongs to a switch"),
        "train.ema_config.use_feedback train.ema_config.param_multiplier": Ignored(
            "it belongs to use_ema"
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
        "model.unet_path model.refiner_name_or_path model.inference_lora_path "
        "model.unconditional_lora_path model.only_if_contains model.ignore_if_contains "
        "model.use_flux_cfg model.in_context model.experimental_xl": NO_COUNTERPART,
        "model.compile model.block_compile": Translated("compile", if_true({"compile": "on"})),
        "model.arch model.is_flux model.is_xl model.is_v3 model.is_v2 model.is_pixart "
        "model.is_lumina2 model.is_auraflow model.is_pixart_sigma model.is_ssd model.is_vega "
        "model.is_v_pred model.latent_space_version model.use_text_encoder_1 "
        "model.use_text_encoder_2 model.unet_sample_size": Ignored("it is read from the base"),
        "model.quantize_kwargs.exclude model.text_encoder_bits model.vae_device model.vae_dtype "
        "model.te_device model.te_dtype model.compile_mode model.compile_fullgraph "
        "model.compile_dynamic model.cache_size_limit model.model_paths model.refiner_start_at "
        "model.quantize_kwargs model.split_model_other_module_param_count_scale "
        "model.quantize_te model.qtype_te model.low_vram model.te_name_or_path "
        "model.extras_name_or_path model.layer_offloading_transformer_percent "
        "model.layer_offloading_text_encoder_percent model.model_kwargs model.dtype "
        "model.model_kwargs.match_target_res "
        "model.attn_masking model.split_model_over_gpus model.accuracy_recovery_adapter": Ignored(
            "encoders leave the GPU when they are not used, and --memory chooses the rest"
        ),
    },
    "Samples and files": {
        "name": Translated("output_dir", remark="in `training_folder`"),
        "training_folder": Translated("output_dir"),
        "trigger_word": Translated("instance_prompt", remark="and before captions that lack it"),
        "sample.sample_every": Translated("validation_steps"),
        "sample.prompts sample.samples": Translated("validation_prompt", convert_prompts),
        "sample.sampler sample.width sample.height sample.neg sample.seed sample.walk_seed "
        "sample.guidance_scale sample.sample_steps sample.sample_start_step sample.format "
        "sample.num_frames sample.fps sample.network_multiplier sample.guidance_rescale "
        "sample.do_cfg_norm sample.refiner_start_at sample.adapter_conditioning_scale "
        "sample.extra_values": Ignored(
            "samples are generated with the base's usual steps and guidance at fixed seeds"
        ),
        "save.save_every": Translated("checkpointing_steps"),
        "save.max_step_saves_to_keep": Translated("checkpoints_total_limit"),
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


def read_values(
    content: Mapping[str, Any], translation: Translation
) -> tuple[dict[str, Any], Datasets]:
    """Return the values and datasets of a job's first process, without those that belong to a
    switch that is off."""
    process = next(iter(to_list(content["config"]["process"])), None)
    if content["job"] != "extension" or not isinstance(process, Mapping) or "train" not in process:
        translation.unsupported.append(f"job {content['job']}: training jobs alone are read")
        return {}, []
    values = {"name": content["config"].get("name")} | flatten_values(process)
    if not process.get("network"):
        translation.unsupported.append("no network: LoRA is trained here, not the whole model")
    datasets = list_mappings(values.pop("datasets", None))
    is_class = [item.pop("is_reg", False) or item.pop("prior_reg", False) for item in datasets]

    # What belongs to a switch that is off
    if not values.get("model.quantize"):
        values.pop("model.qtype", None)
    for name in ("train.diff_output_preservation", "train.blank_prompt_preservation"):
        if values.get(name) in UNSET_VALUES:
            values.pop(f"{name}_multiplier", None)
            values.pop(f"{name}_class", None)
    return values, list(zip(datasets, map(bool, is_class)))


def find_family(values: Mapping[str, Any]) -> str:
    """Return the family of the base; Stable Diffusion 1.5 where nothing is said."""
    name = str(values.get("model.arch") or "").partition(":")[0]
    if not name:
        switches = (key for key in FAMILIES if values.get(f"model.{key}") is True)
        name = next(switches, "sd1")
    return FAMILIES.get(name) or name


def complete_settings(translation: Translation, values: dict[str, Any]) -> None:
    """Store what depends on several keys."""
    settings = translation.settings
    if values.get("name"):
        path = Path(str(values.get("training_folder") or "output")) / str(values["name"])
        translation.set_values({"output_dir": str(path)}, "training_folder, name")

    # Layers, and noise levels, by the family
    family = find_family(values)
    if values.get("network.conv") and family in UNET_FAMILIES:
        rank, alpha = values["network.conv"], values.get("network.conv_alpha")
        translation.add_defaults(adapt_convolutions(rank, alpha or rank))
    set_block_layers(translation, family)
    if values.get("train.noise_scheduler") == "flowmatch":
        kind = str(values.get("train.timestep_type") or "sigmoid")
        source = f"train.timestep_type {kind}{' (nearest)' if kind == 'weighted' else ''}"
        set_noise_levels(translation, family, source, **NOISE_LEVELS.get(kind, {}))

    if settings.get("lr_scheduler") == "constant_with_warmup":
        translation.add_defaults({"lr_warmup_steps": 1000})

    # Batches are counted as steps with this way of accumulation.
    count = values.get("train.gradient_accumulation_steps")
    if isinstance(count, int) and count > 1:
        settings.setdefault("max_train_steps", DEFAULTS["max_train_steps"])
        for name in COUNTS_OF_STEPS:
            if name in settings:
                settings[name] = max(1, settings[name] // count)

    # Prodigy finds the rate.
    if settings.get("optimizer") == "Prodigy" and settings.get("learning_rate", 0) < 0.1:
        translation.set_values({"learning_rate": 1.0}, "Prodigy with a rate below 0.1")
    if values.get("trigger_word"):
        set_trigger(translation, str(values["trigger_word"]))


def set_trigger(translation: Translation, trigger: str) -> None:
    """Put the trigger word into prompts and before captions, as ai-toolkit does."""
    settings = translation.settings
    prompts = [settings.get("instance_prompt") or trigger, *settings.get("validation_prompt", ())]
    prompt, *samples = [text.replace(PLACEHOLDER, trigger) for text in prompts]
    names = {"token": trigger, "caption_prefix": trigger, "instance_prompt": prompt}
    translation.set_values(names, f"trigger_word {trigger}")
    if samples:
        settings["validation_prompt"] = samples


AI_TOOLKIT = Trainer(
    name="ai-toolkit",
    table=TABLE,
    dataset_table=DATASET_TABLE,
    matches=matches_file,
    read_values=read_values,
    complete=complete_settings,
    defaults=DEFAULTS,
)
