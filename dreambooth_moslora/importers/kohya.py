"""Table of kohya's sd-scripts and musubi-tuner: flags, their `--config_file`, and dataset TOML.

Names and defaults: `library/train_util.py`, `library/flux_train_utils.py` and `networks/lora.py` of
kohya-ss/sd-scripts, `hv_train_network.py` and `docs/dataset_config.md` of kohya-ss/musubi-tuner.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import read_json, read_small_text
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.converters import (
    CAPTION_SUFFIX_ROW,
    CLIPPING_ROW,
    choose,
    convert_optimizer,
    convert_precision,
    convert_resolution,
    convert_schedule,
    flatten_values,
    if_true,
    read_number,
    to_positive,
)
from dreambooth_moslora.importers.datasets import list_mappings, list_repeats_folders, to_list
from dreambooth_moslora.importers.families import (
    BLOCK_LAYERS,
    LINEAR_UNET_LAYERS,
    TRANSFORMER_BLOCKS,
    adapt_convolutions,
    is_flow_family,
    set_noise_levels,
)
from dreambooth_moslora.importers.reading import read_file
from dreambooth_moslora.importers.rows import (
    Ignored,
    Table,
    Translated,
    Translation,
    Unsupported,
    UnsupportedValueError,
)
from dreambooth_moslora.importers.trainer import Datasets, Trainer

NETWORK_MODULES: dict[str, tuple[str | None, tuple[str, ...] | None]] = {
    "networks.lora": (None, LINEAR_UNET_LAYERS),
    "networks.lora_sd3": ("sd3", TRANSFORMER_BLOCKS),
    "networks.lora_flux": ("flux", TRANSFORMER_BLOCKS),
    "networks.lora_lumina": ("lumina2", BLOCK_LAYERS["lumina2"]),
    "networks.lora_flux_2": ("flux2", TRANSFORMER_BLOCKS),
    "networks.lora_zimage": ("z_image", ("layers.*.attention.*", "layers.*.feed_forward.*")),
    "networks.lora_qwen_image": ("qwen_image", ("*transformer_blocks.*.attn.*", "*_mlp.*")),
    "networks.lora_krea2": ("krea2", TRANSFORMER_BLOCKS),
    "networks.lora_anima": ("anima", ("transformer_blocks.*.attn*", "transformer_blocks.*.ff.*")),
}
"""`network_module` -> the family that it is for, and the layers that it adapts."""
NETWORK_NAMES = dict.fromkeys(NETWORK_MODULES)
TRAINED_ENCODERS = ("networks.lora", "networks.lora_sd3", "networks.lora_flux")
"""Modules that adapt text encoders which are adapted here too."""
DEFAULTS = {
    "rank": 4,
    "lora_alpha": 1.0,
    "learning_rate": 2e-6,
    "lr_scheduler": "constant",
    "text_encoder_lr": 0.0,
    "train_batch_size": 1,
}
DEFAULT_STEPS = 1600
SIGNATURE = frozenset(
    (
        *("network_module", "network_dim", "network_args", "train_data_dir", "dataset_config"),
        *("max_train_epochs", "unet_lr", "optimizer_type", "config_file", "min_snr_gamma"),
    )
)
"""Keys that only sd-scripts and musubi-tuner have: one of them shows whose command it is."""
SWITCHES = frozenset(
    (
        *("enable_bucket", "shuffle_caption", "flip_aug", "color_aug", "random_crop", "alpha_mask"),
        *("masked_loss", "cache_latents", "cache_latents_to_disk", "skip_cache_check", "v2"),
        *("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "debug_dataset"),
        *("bucket_no_upscale", "enable_wildcard", "weighted_captions", "dim_from_weights"),
        *("network_train_unet_only", "network_train_text_encoder_only", "v_parameterization"),
        *("zero_terminal_snr", "use_8bit_adam", "use_lion_optimizer", "debiased_estimation_loss"),
        *("scale_v_pred_loss_like_noise_pred", "noise_offset_random_strength", "full_fp16"),
        *("ip_noise_gamma_random_strength", "apply_t5_attn_mask", "gradient_checkpointing"),
        *("full_bf16", "fp8_base", "fp8_scaled", "no_half_vae", "lowram", "highvram"),
        *("fused_backward_pass", "gradient_checkpointing_cpu_offload", "split_attn", "flash_attn"),
        *("xformers", "sdpa", "mem_eff_attn", "torch_compile", "persistent_data_loader_workers"),
        *("cache_info", "disable_mmap_load_safetensors", "use_safetensors", "save_state"),
        *("save_state_on_train_end", "no_metadata", "sample_at_first", "log_config", "fp8_llm"),
        *("skip_until_initial_step", "output_config", "async_upload", "fp8_vl", "fp8_t5"),
        *("save_state_to_huggingface", "resume_from_huggingface", "fp8_text_encoder"),
        *("ddp_gradient_as_bucket_view", "ddp_static_graph", "apply_lg_attn_mask", "deepspeed"),
        *("block_swap_h2d_only", "compile", "compile_fullgraph", "console_log_simple"),
        *("cpu_offload_checkpointing", "cuda_allow_tf32", "cuda_cudnn_benchmark"),
        *("disable_numpy_memmap", "dynamo_dynamic", "dynamo_fullgraph", "flash3", "split_mode"),
        *("enable_scaled_pos_embed", "fp16_master_weights_and_gradients", "fp8_base_unet"),
        *("img_in_txt_in_offloading", "preserve_distribution_shape", "save_clip", "save_t5xxl"),
        *("remove_first_image_from_target", "sage_attn", "turbo_dit_cache", "use_sage_attn"),
        *("use_32bit_attention", "use_flash_attn", "use_pinned_memory_for_block_swap"),
        *("vae_tiling", "vae_disable_cache", "unsloth_offload_checkpointing"),
        *("zero3_init_flag", "zero3_save_16bit_model"),
    )
)
LISTS = frozenset(
    (
        *("network_args", "optimizer_args", "lr_scheduler_args", "text_encoder_lr"),
        *("base_weights", "base_weights_multiplier"),
    )
)
OPTIMIZER_ARGUMENTS = {
    "weight_decay": "adam_weight_decay",
    "eps": "adam_epsilon",
    "beta3": "prodigy_beta3",
    "decouple": "prodigy_decouple",
    "use_bias_correction": "prodigy_use_bias_correction",
    "safeguard_warmup": "prodigy_safeguard_warmup",
}
"""Arguments of `optimizer_args` -> settings; `betas` are two."""
IDLE_ARGUMENTS = ("d_coef", "scale_parameter", "relative_step", "warmup_init")
USUAL = ("1", "1.0", "false")
SAMPLE_OPTION = re.compile(r"\s--[a-z]{1,2}\s.*$")
"""Options at the end of a line of `sample_prompts`: `--n blurry --w 1024`."""


def parse_pairs(value: Any) -> dict[str, str]:
    """Return `name=value` arguments as a dict."""
    texts = value if isinstance(value, (list, tuple)) else str(value).split()
    return dict(str(text).split("=", 1) for text in texts if "=" in str(text))


def convert_optimizer_arguments(value: Any) -> dict[str, Any]:
    """Return the settings of `optimizer_args`. Raises UnsupportedValueError."""
    arguments = parse_pairs(value)
    betas = arguments.pop("betas", "").strip("()[]")
    unusual = [arguments.pop(name, "1").lower() not in USUAL for name in IDLE_ARGUMENTS]
    if any(unusual) or arguments.keys() - OPTIMIZER_ARGUMENTS.keys():
        raise UnsupportedValueError(f"betas, {', '.join(OPTIMIZER_ARGUMENTS)} have a counterpart")
    settings = {OPTIMIZER_ARGUMENTS[name]: text for name, text in arguments.items()}
    return settings | dict(zip(("adam_beta1", "adam_beta2"), filter(None, betas.split(","))))


def convert_network_arguments(value: Any) -> dict[str, Any]:
    """Return the settings of `network_args`. Raises UnsupportedValueError."""
    arguments = parse_pairs(value)
    rank, alpha = arguments.pop("conv_dim", None), arguments.pop("conv_alpha", 1)
    if arguments.pop("algo", "lora") != "lora" or arguments:
        raise UnsupportedValueError("conv_dim and conv_alpha have a counterpart")
    return adapt_convolutions(rank, alpha) if rank else {}


def convert_text_encoder_rate(value: Any) -> dict[str, Any]:
    """Return the settings of `text_encoder_lr`, one number or a list; 0 freezes the encoders."""
    texts = value.split() if isinstance(value, str) else to_list(value)
    rate = max(map(float, texts), default=0.0)
    return {"train_text_encoder": rate > 0} | ({"text_encoder_lr": rate} if rate else {})


def read_sample_prompts(value: Any) -> list[str]:
    """Return the prompts of a `sample_prompts` file: lines of text, a list in JSON, or subsets in
    TOML, without their options. Raises UserError."""
    path = Path(str(value))
    if not os.path.isfile(path):
        raise UnsupportedValueError("there is no such file")
    if path.suffix == ".json":
        lines = read_json(path, list)
    elif path.suffix == ".toml":
        lines = to_list(flatten_values(read_file(path)).get("prompt.subset"))
    else:
        lines = read_small_text(path).splitlines()
    texts = [str(line.get("prompt", "") if isinstance(line, Mapping) else line) for line in lines]
    prompts = [SAMPLE_OPTION.sub("", text).strip() for text in texts if not text.startswith("#")]
    return list(filter(None, prompts))


NOISE_LEVELS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "sigmoid": {"scheme": "logit_normal"},
    "shift": {"scheme": "logit_normal"},
    **{
        f"{family}_shift": {"scheme": "logit_normal", "shift": None}
        for family in ("flux", "flux2", "qwen", "krea2")
    },
}
"""`timestep_sampling` -> arguments of `set_noise_levels`; `sigma` reads `weighting_scheme`."""


TABLE: Table = {
    "Photos and captions": {
        "train_data_dir": Translated(
            "instance_data_dir", remark="folders such as `10_sks dog` in it give repeats and prompt"
        ),
        "image_dir image_directory": Translated("instance_data_dir"),
        "num_repeats dataset_repeats": Translated("repeats"),
        "class_tokens": Translated("instance_prompt", remark="for photos without a caption"),
        "dataset_config": Translated("subjects", remark="its folders and settings are read"),
        "in_json metadata_file": Unsupported(
            "captions are `name.txt` or `metadata.jsonl` in the folder of photos"
        ),
        "image_jsonl_file": Translated(
            "instance_data_dir",
            lambda path: str(Path(str(path)).parent),
            "the folder of the file, with its photos",
        ),
        "reg_data_dir": Translated(
            "class_data_dir",
            remark="class images, as for `is_reg`; they are beside photos in a batch, so "
            "half as many steps show as many photos",
        ),
        "prior_loss_weight": Translated(),
        "resolution": Translated(convert=convert_resolution, remark="the square of equal area"),
        "batch_size": Translated("train_batch_size"),
        "enable_bucket": Translated(),
        "bucket_reso_steps": Translated(),
        "min_bucket_reso max_bucket_reso": Ignored(
            "sides lie between half and twice the resolution"
        ),
        "bucket_no_upscale": Ignored("a photo smaller than --resolution is enlarged"),
        "caption_extension caption_extention": CAPTION_SUFFIX_ROW,
        "caption_separator": Unsupported("tags stand between commas", (",",)),
        "shuffle_caption keep_tokens caption_prefix": Translated(),
        "caption_suffix": Unsupported("write it into the captions"),
        "keep_tokens_separator secondary_separator": Unsupported("give --keep_tokens a number"),
        "enable_wildcard": Ignored("with several lines in a caption file, one is picked each time"),
        "caption_dropout_rate": Translated("caption_dropout"),
        "caption_dropout_every_n_epochs caption_tag_dropout_rate": Unsupported(
            "--caption_dropout is a share of all exposures, of whole captions"
        ),
        "token_warmup_step token_warmup_min": Unsupported("captions are whole all along", (1,)),
        "conditioning_data_dir control_directory": Unsupported(
            "photos are trained without control images; a mask lies beside its photo, as "
            "`dog.mask.png`"
        ),
        "weighted_captions": Unsupported("brackets in a caption are letters like others"),
        "max_token_length": Unsupported("77 tokens are read", (75,)),
        "flip_aug": Translated("random_flip"),
        "random_crop": Translated("center_crop", lambda value: not value),
        "face_crop_aug_range color_aug": Unsupported("--crop_zoom is nearest"),
        "masked_loss": Ignored("a mask beside a photo is always used"),
        "alpha_mask": Ignored("a photo's transparency is its mask"),
        "cache_latents": Translated(remark="always so unless `--caching off`"),
        "cache_latents_to_disk": Translated("caching", if_true({"caching": "disk"})),
        "skip_cache_check cache_directory": Ignored("encodings are found by their contents"),
        "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk text_encoder_batch_size": (
            Ignored("frozen text encoders encode prompts once")
        ),
        "resize_interpolation interpolation_type": Ignored("photos are resized by Lanczos"),
        "dataset_class": Unsupported("photos are read from a folder"),
        "video_directory video_jsonl_file": Unsupported("photos alone are trained"),
        "target_frames frame_extraction frame_stride frame_sample max_frames source_fps": Ignored(
            "it belongs to videos"
        ),
        "network_multiplier": Unsupported("all photos count equally", (1, 1.0)),
        "custom_attributes": Unsupported("there is no counterpart"),
        "debug_dataset": Unsupported("`check` shows photos and crops"),
    },
    "Adapter": {
        "network_module": Translated(
            "target_modules", choose(NETWORK_NAMES), "the layers that a LoRA module adapts"
        ),
        "network_dim": Translated("rank"),
        "network_alpha": Translated("lora_alpha"),
        "network_dropout": Translated("lora_dropout"),
        "network_args": Translated(
            "rank_pattern", convert_network_arguments, "`conv_dim` and `conv_alpha`"
        ),
        "network_weights": Translated("init_adapter"),
        "dim_from_weights": Unsupported("a file of another rank is converted to --rank"),
        "base_weights base_weights_multiplier": Unsupported("--companion is nearest", (1, [1])),
        "scale_weight_norms": Unsupported("weights are not clipped"),
        "network_train_unet_only": Translated(
            "train_text_encoder", if_true({"train_text_encoder": False})
        ),
        "network_train_text_encoder_only": Unsupported("the denoiser is always trained"),
        "token_string init_word num_vectors_per_token": Unsupported("no new tokens are learnt"),
    },
    "Training": {
        "pretrained_model_name_or_path": Translated(),
        "dit": Translated("pretrained_model_name_or_path", remark="musubi-tuner's name"),
        "vae": Translated("pretrained_vae_model_name_or_path", remark="a folder or hub id"),
        "text_encoder text_encoder1 text_encoder2 clip_l clip_g t5xxl gemma2 qwen3 ae num_layers "
        "dit_in_channels tokenizer_cache_dir t5_tokenizer_path llm_adapter_path": Ignored(
            "the base's own are used"
        ),
        "vae_dtype dit_dtype t5xxl_dtype t5xxl_device text_encoder_dtype fp8_llm fp8_vl fp8_t5 "
        "fp8_text_encoder": Ignored("encoders work in the run's precision, and only once"),
        "v_parameterization zero_terminal_snr v2 task model_version model_type": Ignored(
            "it is read from the base"
        ),
        "clip_skip": Translated(),
        "learning_rate": Translated(),
        "unet_lr": Translated("learning_rate"),
        "text_encoder_lr text_encoder_lr1 text_encoder_lr2 learning_rate_te learning_rate_te1 "
        "learning_rate_te2": Translated(
            "text_encoder_lr", convert_text_encoder_rate, "one rate for all encoders"
        ),
        "self_attn_lr cross_attn_lr mlp_lr mod_lr llm_adapter_lr": Unsupported(
            "all layers have one rate"
        ),
        "max_train_steps": Translated(),
        "max_train_epochs": Translated("num_train_epochs", remark="wins over the steps"),
        "train_batch_size gradient_accumulation_steps seed": Translated(),
        "max_grad_norm": CLIPPING_ROW,
        "optimizer_type": Translated("optimizer", convert_optimizer),
        "use_8bit_adam": Translated(),
        "use_lion_optimizer": Unsupported("the adapter's optimizer needs little memory"),
        "optimizer_args": Translated("adam_weight_decay", convert_optimizer_arguments),
        "lr_scheduler": Translated(convert=convert_schedule),
        "lr_scheduler_num_cycles": Translated("lr_num_cycles"),
        "lr_scheduler_power": Translated("lr_power"),
        "lr_warmup_steps": Translated(
            convert=lambda value: int(float(value)) or None,
            remark="a share needs `max_train_steps`",
        ),
        "lr_scheduler_type lr_scheduler_args lr_decay_steps lr_scheduler_timescale "
        "lr_scheduler_min_lr_ratio": Unsupported("--lr_scheduler has no such argument"),
        "min_snr_gamma": Translated("snr_gamma", to_positive),
        "debiased_estimation_loss": Translated(),
        "scale_v_pred_loss_like_noise_pred v_pred_like_loss": Unsupported(
            "errors are weighed by --snr_gamma alone"
        ),
        "loss_type": Unsupported("the loss is the mean squared error", ("l2",)),
        "huber_c huber_schedule huber_scale": Ignored("the loss is the mean squared error"),
        "noise_offset": Translated(),
        "noise_offset_random_strength adaptive_noise_scale multires_noise_iterations "
        "ip_noise_gamma ip_noise_gamma_random_strength": Unsupported("--noise_offset is nearest"),
        "multires_noise_discount": Ignored("it belongs to multires_noise_iterations"),
        "min_timestep max_timestep": Unsupported("all noise levels are drawn", (0, 1000)),
        "timestep_sampling": Translated(
            "weighting_scheme", choose(dict.fromkeys(("sigma", *NOISE_LEVELS)))
        ),
        "sigmoid_scale": Translated("logit_std"),
        "discrete_flow_shift training_shift": Translated(
            "flow_shift", remark="with `timestep_sampling` `sigma` and `shift`"
        ),
        "weighting_scheme": Translated(convert=lambda value: {"uniform": "none"}.get(value, value)),
        "logit_mean logit_std mode_scale": Translated(),
        "model_prediction_type": Unsupported("the velocity is predicted", ("raw", "sigma_scaled")),
        "guidance_scale": Translated(),
        "t5xxl_max_token_length gemma2_max_token_length qwen3_max_token_length "
        "t5_max_token_length": Translated("max_sequence_length"),
        "clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate": Unsupported(
            "--caption_dropout leaves out the caption for all encoders", ("0", "0.0")
        ),
        "pos_emb_random_crop_rate enable_scaled_pos_embed num_timestep_buckets "
        "preserve_distribution_shape remove_first_image_from_target": Unsupported(
            "there is no counterpart", ("0", "0.0")
        ),
        "system_prompt": Unsupported("Lumina 2's own sentence is put before each prompt"),
        "apply_t5_attn_mask apply_lg_attn_mask": Ignored(
            "text is masked as in the base's pipeline"
        ),
    },
    "Memory, files and samples": {
        "mixed_precision": Translated(convert=convert_precision),
        "gradient_checkpointing": Translated(),
        "blocks_to_swap": Translated(
            "stream_blocks", lambda value: int(value) > 0, "all blocks, whatever the number is"
        ),
        "full_fp16 full_bf16": Ignored("the adapter is trained in fp32"),
        "fp8_base fp8_base_unet fp8_scaled": Translated(
            "base_quantization", if_true({"base_quantization": "int8"}), "8 bit"
        ),
        "no_half_vae": Ignored("the VAE computes in fp32 where half precision overflows"),
        "lowram highvram cpu_offload_checkpointing img_in_txt_in_offloading split_mode "
        "block_swap_h2d_only block_swap_ring_size use_pinned_memory_for_block_swap "
        "disable_numpy_memmap vae_tiling vae_disable_cache vae_chunk_size "
        "vae_spatial_tile_sample_min_size unsloth_offload_checkpointing "
        "turbo_dit turbo_dit_cache sample_batch_size fused_backward_pass "
        "gradient_checkpointing_cpu_offload split_attn "
        "flash_attn": Ignored("--memory chooses what is kept on the GPU"),
        "xformers sdpa mem_eff_attn sage_attn flash3 use_flash_attn use_sage_attn "
        "use_32bit_attention attn_mode cuda_allow_tf32 cuda_cudnn_benchmark": Ignored(
            "PyTorch's own attention is used"
        ),
        "torch_compile compile": Translated("compile", if_true({"compile": "on"})),
        "dynamo_backend dynamo_mode dynamo_dynamic dynamo_fullgraph compile_mode compile_backend "
        "compile_dynamic compile_fullgraph compile_cache_size_limit": Ignored(
            "the default backend is used"
        ),
        "max_data_loader_n_workers persistent_data_loader_workers vae_batch_size cache_info "
        "disable_mmap_load_safetensors": Ignored("photos are encoded once"),
        "output_dir": Translated(remark="the run folder is `output_name` in it"),
        "output_name": Translated("output_dir"),
        "save_precision": Ignored("the adapter is saved in its own precision"),
        "save_model_as use_safetensors": Ignored("adapters are always safetensors"),
        "save_every_n_steps": Translated("checkpointing_steps"),
        "save_every_n_epochs save_n_epoch_ratio": Ignored("--checkpointing_steps counts steps"),
        "save_last_n_steps save_last_n_epochs save_last_n_steps_state save_last_n_epochs_state": (
            Ignored("--checkpoints_total_limit keeps a number of checkpoints")
        ),
        "save_state save_state_on_train_end": Ignored(
            "each checkpoint holds all that resuming needs"
        ),
        "resume": Translated("resume_from_checkpoint", remark="of this program alone"),
        "initial_epoch initial_step skip_until_initial_step": Unsupported(
            "the checkpoint says the step"
        ),
        "metadata_arch metadata_reso no_metadata training_comment metadata_title metadata_author "
        "metadata_description "
        "metadata_license metadata_tags metadata_usage_hint metadata_trigger_phrase "
        "metadata_thumbnail metadata_merged_from metadata_preprocessor "
        "metadata_is_negative_embedding": Ignored("the header holds numbers and trigger words"),
        "sample_prompts": Translated("validation_prompt", read_sample_prompts),
        "sample_every_n_steps": Translated("validation_steps", to_positive),
        "sample_every_n_epochs": Translated("validation_epochs"),
        "sample_at_first sample_sampler": Ignored("samples are generated before the first step"),
        "validation_split validation_seed validate_every_n_steps validate_every_n_epochs "
        "max_validation_steps": Ignored("--evaluate_steps scores samples"),
        "logging_dir": Translated(),
        "log_with": Translated("report_to"),
        "log_prefix log_tracker_name log_tracker_config wandb_run_name wandb_api_key log_config": (
            Ignored("the tracker reads its own login and takes the run folder's name")
        ),
        "huggingface_repo_id": Translated("hub_model_id", remark="with `--push_to_hub`"),
        "huggingface_token": Translated("hub_token"),
        "huggingface_repo_type huggingface_path_in_repo huggingface_repo_visibility "
        "save_state_to_huggingface resume_from_huggingface async_upload": Ignored(
            "--push_to_hub uploads the adapter alone, as a private repository"
        ),
        "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph": Ignored(
            "accelerate's settings are used"
        ),
        "output_config config_file": Ignored("--config reads a file"),
        "save_clip save_t5xxl": Ignored("adapters alone are saved"),
        "show_timesteps": Unsupported("timesteps are not drawn as a picture"),
        "console_log_file console_log_level console_log_simple": Ignored(
            "the run folder has the log"
        ),
        "deepspeed zero_stage zero3_init_flag zero3_save_16bit_model offload_optimizer_device "
        "offload_optimizer_nvme_path offload_param_device offload_param_nvme_path "
        "fp16_master_weights_and_gradients": Unsupported("DeepSpeed is not used"),
    },
}


def matches_file(content: Mapping[str, Any]) -> bool:
    """Return whether the content is that of a `--config_file` or of a dataset TOML."""
    names = set(content)
    for value in content.values():
        if isinstance(value, Mapping):
            names |= value.keys()
    return bool(names & SIGNATURE) or bool(list_mappings(content.get("datasets")))


def read_values(
    content: Mapping[str, Any], translation: Translation
) -> tuple[dict[str, Any], Datasets]:
    """Return the values and datasets of a command or a file, whose tables of arguments have no
    meaning. Raises UserError for a file that it names and that cannot be read."""
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in ("general", "datasets"):
            values |= value if isinstance(value, Mapping) else {name: value}
    if values.get("dataset_config"):
        path = Path(str(values.pop("dataset_config")))
        if not os.path.exists(path):
            raise UserError(f"dataset_config {path}: there is no such file.")
        content = read_file(path)
    datasets = list(list_datasets(content))
    data_dir, reg_dir = values.pop("train_data_dir", None), values.pop("reg_data_dir", None)
    if not datasets:
        datasets = [(item, False) for item in list_folder_datasets(data_dir)]
        datasets += [(item, True) for item in list_folder_datasets(reg_dir)]

    # What wins over another key comes after it.
    for name in ("unet_lr", "optimizer_args", "network_train_unet_only"):
        if name in values:
            values[name] = values.pop(name)
    return values, datasets


def list_datasets(content: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield each subset of `[general]`, `[[datasets]]` and `[[datasets.subsets]]`, the inner values
    last, and whether its images are those of the class."""
    general = content.get("general")
    general = general if isinstance(general, Mapping) else {}
    for dataset in list_mappings(content.get("datasets")):
        for subset in list_mappings(dataset.pop("subsets", None)) or [{}]:
            merged = {**general, **dataset, **subset}
            yield merged, bool(merged.pop("is_reg", False))


def list_folder_datasets(parent: Any) -> list[dict[str, Any]]:
    """Return the values of folders such as `10_sks dog` in a folder, or of the folder itself."""
    if not parent:
        return []
    return [
        {"image_dir": str(folder), "class_tokens": prompt, "num_repeats": repeats}
        for folder, prompt, repeats in list_repeats_folders(Path(str(parent)))
    ] or [{"image_dir": str(parent)}]


def complete_settings(translation: Translation, values: dict[str, Any]) -> None:
    """Store what depends on several keys."""
    settings = translation.settings

    # Epochs win over steps; a warm-up may be a share of the steps.
    if "num_train_epochs" in settings:
        settings.pop("max_train_steps", None)
    else:
        translation.add_defaults({"max_train_steps": DEFAULT_STEPS})
    share = read_number(values, "lr_warmup_steps", 0)
    if 0 < share < 1 and "max_train_steps" in settings:
        settings["lr_warmup_steps"] = int(share * settings["max_train_steps"])
    elif 0 < share < 1:
        translation.unsupported.append(f"lr_warmup_steps {share}: give it in steps")

    # output_dir/output_name is the run folder.
    if values.get("output_name"):
        folder = Path(str(values.get("output_dir") or "output")) / str(values["output_name"])
        translation.set_values({"output_dir": str(folder)}, "output_dir, output_name")
    if values.get("huggingface_repo_id"):
        settings["push_to_hub"] = True

    # Text encoders are trained unless they are frozen or their outputs are cached.
    module = str(values.get("network_module") or "networks.lora")
    family, layers = NETWORK_MODULES.get(module, (None, None))
    is_frozen = values.get("cache_text_encoder_outputs") or values.get("dit")
    is_trained = module in TRAINED_ENCODERS and not is_frozen
    translation.add_defaults({"train_text_encoder": is_trained})
    if settings["train_text_encoder"] and "unet_lr" in values:
        rate = read_number(values, "learning_rate", 2e-6)
        translation.add_defaults({"text_encoder_lr": rate})

    # FLUX.1's default there compares an estimate of the clean latents with the velocity.
    prediction = values.get("model_prediction_type", "sigma_scaled")
    if family == "flux" and prediction == "sigma_scaled":
        reason = "the velocity is compared with the velocity, as with `raw`"
        translation.ignore("model_prediction_type sigma_scaled, which FLUX.1 has there", reason)

    # Layers, and noise levels, by the module. Its two programs have other defaults.
    if layers:
        translation.add_defaults({"target_modules": list(layers)})
    set_flow_levels(translation, family, values)


def set_flow_levels(
    translation: Translation, family: str | None, values: Mapping[str, Any]
) -> None:
    """Store how the noise levels of a flow are drawn."""
    settings = translation.settings
    shift = settings.pop("flow_shift", {"flux": 3.0, "lumina2": 6.0}.get(str(family), 1.0))
    default = {"lumina2": "shift", "anima": "sigmoid"}.get(str(family), "sigma")
    kind = str(values.get("timestep_sampling") or default)
    if kind == "sigma":
        # As in diffusers' scripts: our own settings, and errors of the latents for SD 3.5
        if is_flow_family(family):
            translation.set_values({"flow_shift": shift}, "discrete_flow_shift")
            translation.add_defaults({"weighting_scheme": "none"})
        return
    arguments = {"shift": shift if kind == "shift" else 1.0} | NOISE_LEVELS.get(kind, {})
    std = read_number(values, "sigmoid_scale", 1.0)
    set_noise_levels(translation, family, f"timestep_sampling {kind}", std=std, **arguments)


KOHYA = Trainer(
    name="kohya's sd-scripts",
    table=TABLE,
    dataset_table=TABLE,
    matches=matches_file,
    read_values=read_values,
    complete=complete_settings,
    defaults=DEFAULTS,
)
