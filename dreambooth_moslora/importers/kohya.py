"""Table of kohya's sd-scripts and musubi-tuner: flags, their `--config_file`, and dataset TOML.

Names and defaults: `library/train_util.py`, `library/flux_train_utils.py` and `networks/lora.py` of
kohya-ss/sd-scripts, `hv_train_network.py` and `docs/dataset_config.md` of kohya-ss/musubi-tuner.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import read_small_text
from dreambooth_moslora.importers.converters import (
    CAPTION_SUFFIX_ROW,
    convert_optimizer,
    convert_precision,
    convert_resolution,
    convert_schedule,
    if_true,
    to_number,
    to_positive,
)
from dreambooth_moslora.importers.datasets import (
    complete_class_prompt,
    list_repeats_folders,
    set_class_images,
    set_photos,
    to_list,
    translate_datasets,
)
from dreambooth_moslora.importers.reading import read_file
from dreambooth_moslora.importers.rows import (
    DEFAULT_SOURCE,
    Ignored,
    Table,
    Translated,
    Translation,
    Unsupported,
    UnsupportedValueError,
)

TRAINER = "kohya's sd-scripts"
LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
]
"""Layers of a UNet that `networks.lora` adapts."""
DEFAULTS = {
    "mixer": "none",
    "rank": 4,
    "lora_alpha": 1.0,
    "learning_rate": 2e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "optimizer": "AdamW",
    "adam_weight_decay": 0.01,
    "adam_weight_decay_text_encoder": 0.01,
    "text_encoder_lr": 0.0,
    "train_batch_size": 1,
    "center_crop": True,
    "instance_prompt": "",
    "instance_prompt_share": 0.0,
}
"""Settings of a command that says nothing of them. AdamW's weight decay is PyTorch's."""
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
        *("ddp_gradient_as_bucket_view", "ddp_static_graph"),
    )
)
"""Flags that take no value."""
LISTS = frozenset(
    (
        *("network_args", "optimizer_args", "lr_scheduler_args", "text_encoder_lr"),
        *("base_weights", "base_weights_multiplier"),
    )
)
"""Flags that take several values."""
OPTIMIZER_ARGUMENTS = {
    "weight_decay": "adam_weight_decay",
    "eps": "adam_epsilon",
    "beta3": "prodigy_beta3",
    "decouple": "prodigy_decouple",
    "use_bias_correction": "prodigy_use_bias_correction",
    "safeguard_warmup": "prodigy_safeguard_warmup",
}
"""Arguments of `optimizer_args` -> settings; `betas` are two."""
SAMPLE_OPTION = re.compile(r"\s--[a-z]{1,2}\s.*$")
"""Options at the end of a line of `sample_prompts`: `--n blurry --w 1024`."""


def parse_pairs(value: Any) -> dict[str, str]:
    """Return `name=value` arguments as a dict."""
    texts = value if isinstance(value, (list, tuple)) else str(value).split()
    return dict(str(text).split("=", 1) for text in texts if "=" in str(text))


def convert_optimizer_arguments(value: Any) -> dict[str, Any]:
    """Return the settings of `optimizer_args`. Raises UnsupportedValueError."""
    settings: dict[str, Any] = {}
    for name, text in parse_pairs(value).items():
        if name == "betas":
            beta1, beta2, *_ = text.strip("()[]").split(",")
            settings |= {"adam_beta1": float(beta1), "adam_beta2": float(beta2)}
        elif name in ("d_coef", "scale_parameter", "relative_step", "warmup_init"):
            if text.lower() not in ("1", "1.0", "false"):
                raise UnsupportedValueError(f"{name} has no counterpart")
        elif name in OPTIMIZER_ARGUMENTS:
            settings[OPTIMIZER_ARGUMENTS[name]] = text.lower() if "=" not in text else text
        else:
            raise UnsupportedValueError(f"{name} has no counterpart")
    if "adam_weight_decay" in settings:
        settings["adam_weight_decay_text_encoder"] = settings["adam_weight_decay"]
    return settings


def convert_network_arguments(value: Any) -> dict[str, Any]:
    """Return the settings of `network_args`. Raises UnsupportedValueError."""
    settings: dict[str, Any] = {}
    for name, text in parse_pairs(value).items():
        if name == "conv_dim":
            settings["rank_pattern"] = [f"*conv*={text}"]
            settings["target_modules"] = [*LORA_TARGETS, "*conv*"]
        elif name == "conv_alpha":
            settings["alpha_pattern"] = [f"*conv*={text}"]
        elif name == "algo" and text == "lora":
            pass
        else:
            raise UnsupportedValueError(f"{name} has no counterpart")
    return settings


def convert_module(value: Any) -> dict[str, Any] | None:
    """Return the layers that a LoRA module adapts in a UNet. Raises UnsupportedValueError for any
    other module."""
    if value == "networks.lora":
        return {"target_modules": LORA_TARGETS}
    if not re.fullmatch(r"networks\.lora_\w+", str(value)):
        raise UnsupportedValueError("LoRA is the only kind of adapter here")
    return None


def convert_warmup(value: Any) -> dict[str, Any] | None:
    """Return whole steps of warm-up. Raises UnsupportedValueError for a share of the run."""
    steps = float(value)
    if 0 < steps < 1:
        raise UnsupportedValueError("give the warm-up in steps")
    return {"lr_warmup_steps": int(steps)}


def convert_text_encoder_rate(value: Any) -> dict[str, Any]:
    """Return the settings of `text_encoder_lr`, one number or a list; 0 freezes the encoders."""
    rates = [
        float(rate) for rate in to_list(value if not isinstance(value, str) else value.split())
    ]
    if not any(rates):
        return {"train_text_encoder": False}
    return {"text_encoder_lr": max(rates), "train_text_encoder": True}


def read_sample_prompts(value: Any) -> list[str]:
    """Return the prompts of a `sample_prompts` file, without their options. Raises UserError."""
    path = Path(str(value))
    if not path.is_file() or path.suffix != ".txt":
        raise UnsupportedValueError("expected a .txt file with a prompt on each line")
    lines = read_small_text(path).splitlines()
    prompts = [SAMPLE_OPTION.sub("", line).strip() for line in lines if not line.startswith("#")]
    return list(filter(None, prompts))


def convert_timestep_sampling(value: Any) -> dict[str, Any]:
    """Return how noise levels are drawn. Raises UnsupportedValueError."""
    kinds: dict[str, dict[str, Any]] = {
        "sigma": {},
        "uniform": {"weighting_scheme": "none"},
        "sigmoid": {"weighting_scheme": "logit_normal"},
        "shift": {"weighting_scheme": "logit_normal"},
        "flux_shift": {"weighting_scheme": "logit_normal", "shift_timesteps": True},
        "qwen_shift": {"weighting_scheme": "logit_normal", "shift_timesteps": True},
    }
    if value not in kinds:
        raise UnsupportedValueError(f"one of {', '.join(kinds)} has a counterpart")
    return kinds[value]


TABLE: Table = {
    "Photos and captions": {
        "train_data_dir": Translated(
            "instance_data_dir", remark="folders such as `10_sks dog` in it give repeats and prompt"
        ),
        "image_dir image_directory": Translated("instance_data_dir"),
        "num_repeats dataset_repeats": Translated("repeats", int),
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
            "class_data_dir", remark="with `--with_prior_preservation`, as for `is_reg`"
        ),
        "prior_loss_weight": Translated(convert=to_number),
        "resolution": Translated(convert=convert_resolution, remark="the square of equal area"),
        "batch_size": Translated("train_batch_size", int),
        "enable_bucket": Translated(),
        "bucket_reso_steps": Translated(convert=int),
        "min_bucket_reso max_bucket_reso": Ignored(
            "sides lie between half and twice the resolution"
        ),
        "bucket_no_upscale": Unsupported("a small photo is enlarged to the area of --resolution"),
        "caption_extension caption_extention": CAPTION_SUFFIX_ROW,
        "caption_separator": Unsupported("tags stand between commas", (",",)),
        "shuffle_caption keep_tokens caption_prefix": Translated(),
        "caption_suffix": Unsupported("write it into the captions"),
        "keep_tokens_separator secondary_separator": Unsupported("give --keep_tokens a number"),
        "enable_wildcard": Ignored("with several lines in a caption file, one is picked each time"),
        "caption_dropout_rate": Translated("caption_dropout", to_number),
        "caption_dropout_every_n_epochs caption_tag_dropout_rate": Unsupported(
            "--caption_dropout is a share of all exposures, of whole captions"
        ),
        "token_warmup_step token_warmup_min": Unsupported("captions are whole all along", (1,)),
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
        "resize_interpolation": Ignored("photos are resized by Lanczos"),
        "dataset_class": Unsupported("photos are read from a folder"),
        "debug_dataset": Unsupported("`check` shows photos and crops"),
    },
    "Adapter": {
        "network_module": Translated("mixer", convert_module, "LoRA modules; `--mixer none`"),
        "network_dim": Translated("rank", int),
        "network_alpha": Translated("lora_alpha", to_number),
        "network_dropout": Translated("lora_dropout", to_number),
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
        "text_encoder clip_l clip_g t5xxl ae": Ignored("the base's own are used"),
        "vae_dtype text_encoder_dtype fp8_llm fp8_vl fp8_t5 fp8_text_encoder": Ignored(
            "encoders work in the run's precision, and only once"
        ),
        "v_parameterization zero_terminal_snr v2 task model_version": Ignored(
            "it is read from the base"
        ),
        "clip_skip": Translated(convert=int),
        "learning_rate": Translated(convert=to_number),
        "unet_lr": Translated("learning_rate", to_number),
        "text_encoder_lr text_encoder_lr1 text_encoder_lr2": Translated(
            "text_encoder_lr", convert_text_encoder_rate, "one rate for all encoders"
        ),
        "max_train_steps": Translated(convert=int),
        "max_train_epochs": Translated("num_train_epochs", int, "wins over the steps"),
        "train_batch_size gradient_accumulation_steps seed": Translated(convert=int),
        "max_grad_norm": Translated(
            convert=lambda value: float(value) or 1e9, remark="0 clips nothing"
        ),
        "optimizer_type": Translated("optimizer", convert_optimizer),
        "use_8bit_adam": Translated(),
        "use_lion_optimizer": Unsupported("the adapter's optimizer needs little memory"),
        "optimizer_args": Translated("adam_weight_decay", convert_optimizer_arguments),
        "lr_scheduler": Translated(convert=convert_schedule),
        "lr_scheduler_num_cycles": Translated("lr_num_cycles", int),
        "lr_scheduler_power": Translated("lr_power", to_number),
        "lr_warmup_steps": Translated(convert=convert_warmup, remark="in steps"),
        "lr_scheduler_type lr_scheduler_args lr_decay_steps lr_scheduler_timescale "
        "lr_scheduler_min_lr_ratio": Unsupported("--lr_scheduler has no such argument"),
        "min_snr_gamma": Translated("snr_gamma", to_positive),
        "debiased_estimation_loss": Translated(),
        "scale_v_pred_loss_like_noise_pred v_pred_like_loss": Unsupported(
            "errors are weighed by --snr_gamma alone"
        ),
        "loss_type": Unsupported("the loss is the mean squared error", ("l2",)),
        "huber_c huber_schedule huber_scale": Ignored("the loss is the mean squared error"),
        "noise_offset": Translated(convert=to_number),
        "noise_offset_random_strength adaptive_noise_scale multires_noise_iterations "
        "ip_noise_gamma ip_noise_gamma_random_strength": Unsupported("--noise_offset is nearest"),
        "multires_noise_discount": Ignored("it belongs to multires_noise_iterations"),
        "min_timestep max_timestep": Unsupported("all noise levels are drawn", (0, 1000)),
        "timestep_sampling": Translated("weighting_scheme", convert_timestep_sampling),
        "sigmoid_scale": Translated("logit_std", to_number),
        "discrete_flow_shift training_shift": Translated(
            "logit_mean",
            lambda value: math.log(float(value)),
            "a shift of s moves the mean by ln s",
        ),
        "weighting_scheme": Translated(convert=lambda value: {"uniform": "none"}.get(value, value)),
        "logit_mean logit_std mode_scale": Translated(convert=to_number),
        "model_prediction_type": Unsupported("the velocity is predicted", ("raw",)),
        "guidance_scale": Translated(convert=to_number),
        "t5xxl_max_token_length": Translated("max_sequence_length", int),
        "apply_t5_attn_mask": Ignored("text is masked as in the base's pipeline"),
    },
    "Memory, files and samples": {
        "mixed_precision": Translated(convert=convert_precision),
        "gradient_checkpointing": Translated(),
        "blocks_to_swap": Translated(
            "stream_blocks", lambda value: int(value) > 0, "all blocks, whatever the number is"
        ),
        "full_fp16 full_bf16": Ignored("the adapter is trained in fp32"),
        "fp8_base fp8_scaled": Translated(
            "base_quantization", if_true({"base_quantization": "int8"}), "8 bit"
        ),
        "no_half_vae": Ignored("the VAE computes in fp32 where half precision overflows"),
        "lowram highvram fused_backward_pass gradient_checkpointing_cpu_offload split_attn "
        "flash_attn": Ignored("--memory chooses what is kept on the GPU"),
        "xformers sdpa mem_eff_attn": Ignored("PyTorch's own attention is used"),
        "torch_compile": Translated("compile", if_true({"compile": "on"})),
        "dynamo_backend compile_mode": Ignored("the default backend is used"),
        "max_data_loader_n_workers persistent_data_loader_workers vae_batch_size cache_info "
        "disable_mmap_load_safetensors": Ignored("photos are encoded once"),
        "output_dir": Translated(remark="the run folder is `output_name` in it"),
        "output_name": Translated("output_dir"),
        "save_precision": Ignored("the adapter is saved in its own precision"),
        "save_model_as use_safetensors": Ignored("adapters are always safetensors"),
        "save_every_n_steps": Translated("checkpointing_steps", int),
        "save_every_n_epochs save_n_epoch_ratio": Ignored("--checkpointing_steps counts steps"),
        "save_last_n_steps save_last_n_epochs save_last_n_steps_state save_last_n_epochs_state": (
            Ignored("--checkpoints_total_limit keeps a number of checkpoints")
        ),
        "save_state save_state_on_train_end": Ignored(
            "each checkpoint holds all that resuming needs"
        ),
        "resume": Translated("resume_from_checkpoint", remark="of this program alone"),
        "initial_step skip_until_initial_step": Unsupported("the checkpoint says the step"),
        "no_metadata training_comment metadata_title metadata_author metadata_description "
        "metadata_license metadata_tags": Ignored("the header holds numbers and trigger words"),
        "sample_prompts": Translated("validation_prompt", read_sample_prompts),
        "sample_every_n_steps": Translated("validation_steps", int),
        "sample_every_n_epochs": Translated("validation_epochs", int),
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
    },
}


def translate_config(values: Mapping[str, Any], trainer: str = TRAINER) -> Translation:
    """Return the settings of a command or a configuration file.

    values: flags by name, or the content of a TOML file with its tables

    Raises UserError for a file that it names and that cannot be read.
    """
    # Tables of arguments have no meaning of their own; dataset tables do.
    translation = Translation(trainer)
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name != "general":
            flat |= value
        elif name not in ("general", "datasets"):
            flat[name] = value
    dataset_values = values
    if flat.get("dataset_config"):
        dataset_values = read_file(Path(str(flat.pop("dataset_config"))))

    # Datasets first, as a command's own value of a setting comes second there too.
    data_dir, reg_dir = flat.pop("train_data_dir", None), flat.pop("reg_data_dir", None)
    translation.translate_values(TABLE, order_keys(flat))
    translate_datasets(translation, TABLE, list_datasets(dataset_values))
    if data_dir and "datasets" not in dataset_values:
        set_photos(
            translation,
            list_repeats_folders(Path(data_dir)) or [{"instance_data_dir": data_dir}],
        )
        if reg_dir:
            set_class_images(translation, reg_dir)

    complete_settings(translation, flat)
    complete_class_prompt(translation)
    translation.add_defaults(DEFAULTS)
    return translation


def order_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values so that what wins over another key comes after it."""
    last = ("unet_lr", "optimizer_args", "network_train_unet_only", "output_name")
    ordered = {name: value for name, value in values.items() if name not in last}
    return ordered | {name: values[name] for name in last if name in values}


def list_datasets(values: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield each subset of `[general]`, `[[datasets]]` and `[[datasets.subsets]]`, the inner values
    last, and whether its images are those of the class."""
    for dataset in values.get("datasets") or ():
        for subset in dataset.get("subsets") or ({},):
            merged = (values.get("general") or {}) | dataset | subset
            merged.pop("subsets", None)
            yield merged, bool(merged.pop("is_reg", False))


def complete_settings(translation: Translation, values: Mapping[str, Any]) -> None:
    """Store what depends on several keys: the length, the run folder, the text encoders."""
    settings = translation.settings

    # Epochs win over steps.
    if "num_train_epochs" in settings:
        settings.pop("max_train_steps", None)
    elif "max_train_steps" not in settings:
        translation.set_values({"max_train_steps": DEFAULT_STEPS}, DEFAULT_SOURCE)

    # output_dir/output_name is the run folder.
    if values.get("output_name"):
        folder = Path(values.get("output_dir") or "output") / values["output_name"]
        translation.set_values({"output_dir": str(folder)}, "output_dir, output_name")

    # Text encoders are trained unless they are frozen or their outputs are cached.
    is_cached = values.get("cache_text_encoder_outputs") or values.get("network_train_unet_only")
    if "train_text_encoder" not in settings:
        settings["train_text_encoder"] = not is_cached
    if values.get("huggingface_repo_id"):
        settings["push_to_hub"] = True
