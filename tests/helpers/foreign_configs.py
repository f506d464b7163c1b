"""Configurations as the users of other trainers write them, in each trainer's form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_moslora.importers import ai_toolkit, kohya, onetrainer, simpletuner
from dreambooth_moslora.importers.families import LINEAR_UNET_LAYERS
from dreambooth_moslora.importers.rows import Table

AI_TOOLKIT = """
job: extension
config:
  name: my_dog
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: sks
      network: {type: lora, linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - folder_path: photos
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 2
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        dtype: bf16
        timestep_type: sigmoid
        ema_config: {use_ema: true, ema_decay: 0.99}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true, quantize: true}
      sample:
        sampler: flowmatch
        sample_every: 500
        width: 1024
        prompts: ["[trigger] dog, running", a photo of a cat]
        neg: ""
        seed: 42
meta: {name: "[name]", version: "1.0"}
"""
KOHYA = """
pretrained_model_name_or_path = "stabilityai/stable-diffusion-xl-base-1.0"
output_dir = "out"
output_name = "dog"
network_module = "networks.lora"
network_dim = 16
network_alpha = 8
network_train_unet_only = true
unet_lr = 2e-4
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
lr_scheduler = "cosine"
lr_warmup_steps = 50
max_train_epochs = 10
min_snr_gamma = 5
mixed_precision = "bf16"
gradient_checkpointing = true
sdpa = true
save_every_n_steps = 200
[general]
enable_bucket = true
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = [1024, 1024]
batch_size = 2
[[datasets.subsets]]
image_dir = "photos"
class_tokens = "sks dog"
num_repeats = 10
[[datasets.subsets]]
image_dir = "regular"
is_reg = true
[[datasets]]
resolution = 512
batch_size = 2
[[datasets.subsets]]
image_dir = "photos"
class_tokens = "sks dog"
num_repeats = 10
"""
ONETRAINER: dict[str, Any] = {
    "__version": 10,
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
    "output_model_destination": "models/dog.safetensors",
    "lora_rank": 16,
    "lora_alpha": 1.0,
    "learning_rate": 3e-4,
    "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 100,
    "epochs": 10,
    "batch_size": 4,
    "resolution": "1024",
    "optimizer": {"optimizer": "ADAMW", "weight_decay": 0.02, "beta1": 0.9, "beta2": 0.999},
    "layer_filter_preset": "attn-mlp",
    "unet": {"weight_dtype": "FLOAT_16", "train": True},
    "text_encoder": {"train": False},
    "masked_training": True,
    "unmasked_weight": 0.2,
    "offset_noise_weight": 0.05,
    "concepts": [
        {
            "path": "photos",
            "balancing": 20.0,
            "image": {"enable_crop_jitter": False, "enable_random_flip": True},
            "text": {"prompt_source": "sample"},
        }
    ],
    "samples": [
        {"prompt": "a photo of sks dog", "enabled": True},
        {"prompt": "x", "enabled": False},
    ],
}
SIMPLETUNER: dict[str, Any] = {
    "--model_family": "z_image",
    "--model_flavour": "base",
    "--model_type": "lora",
    "--lora_rank": 8,
    "--learning_rate": "2e-4",
    "--optimizer": "adamw_bf16",
    "--lr_scheduler": "cosine",
    "--lr_warmup_steps": 20,
    "--max_train_steps": 300,
    "--num_train_epochs": 0,
    "--train_batch_size": 1,
    "--base_model_precision": "int8-quanto",
    "--flow_schedule_shift": 3,
    "--mixed_precision": "bf16",
    "--data_backend_config": "multidatabackend.json",
    "--output_dir": "out",
    "--validation_prompt": "a photo of sks dog",
    "--validation_steps": 100,
    "--seed": 42,
}
BACKENDS = [
    {
        "id": "dog",
        "type": "local",
        "instance_data_dir": "photos",
        "caption_strategy": "instanceprompt",
        "instance_prompt": "sks dog",
        "resolution": 1.0,
        "resolution_type": "area",
        "crop_style": "random",
        "crop_aspect": "square",
        "repeats": 3,
        "cache_dir_vae": "cache",
    },
    {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache"},
]


@dataclass(frozen=True)
class ForeignConfig:
    """Configuration of a trainer: its file, its table, and settings that it means."""

    file_name: str
    content: str
    table: Table
    settings: Mapping[str, Any]


CONFIGS = {
    "ai-toolkit": ForeignConfig(
        "job.yaml",
        AI_TOOLKIT,
        {**ai_toolkit.TABLE, **ai_toolkit.DATASET_TABLE},
        {
            "rank": 16,
            "lora_alpha": 8.0,
            "mixer": "none",
            "learning_rate": 1e-4,
            "lr_scheduler": "constant",
            "use_8bit_adam": True,
            "adam_weight_decay": 0.01,
            "max_train_steps": 1000,  # batches are counted there
            "gradient_accumulation_steps": 2,
            "adam_epsilon": 1e-6,
            "target_modules": ("*transformer_blocks.*",),
            "flow_shift": 1.0,
            "resolution": 1024,
            "more_resolutions": ("768", "512"),
            "instance_prompt": "sks",
            "caption_prefix": "sks",
            "caption_dropout": 0.05,
            "validation_prompt": ("sks dog, running", "a photo of a cat"),
            "validation_steps": 250,
            "weighting_scheme": "logit_normal",
            "base_quantization": "int8",
            "output_dir": "output/my_dog",
            "checkpoints_total_limit": 4,
        },
    ),
    "kohya": ForeignConfig(
        "config.toml",
        KOHYA,
        kohya.TABLE,
        {
            "rank": 16,
            "lora_alpha": 8.0,
            "mixer": "none",
            "learning_rate": 2e-4,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 50,
            "use_8bit_adam": True,
            "adam_weight_decay": 0.1,
            "adam_beta2": 0.99,
            "num_train_epochs": 10,
            "max_train_steps": None,
            "train_batch_size": 2,
            "train_text_encoder": False,
            "target_modules": LINEAR_UNET_LAYERS,
            "resolution": 1024,
            "more_resolutions": ("512",),
            "instance_data_dir": "photos",
            "instance_prompt": "sks dog",
            "repeats": 10,
            "with_prior_preservation": True,
            "class_data_dir": "regular",
            "class_prompt": "a photo of a dog",
            "shuffle_caption": True,
            "keep_tokens": 1,
            "snr_gamma": 5.0,
            "output_dir": "out/dog",
            "checkpointing_steps": 200,
        },
    ),
    "OneTrainer": ForeignConfig(
        "config.json",
        json.dumps(ONETRAINER),
        {**onetrainer.TABLE, **onetrainer.CONCEPT_TABLE},
        {
            "rank": 16,
            "lora_alpha": 1.0,
            "mixer": "none",
            "learning_rate": 3e-4,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 100,
            "adam_weight_decay": 0.02,
            "num_train_epochs": 10,
            "train_batch_size": 4,
            "train_text_encoder": False,
            "target_modules": ("*attentions*",),
            "repeats": 20,
            "center_crop": True,
            "random_flip": True,
            "unmasked_weight": 0.2,
            "noise_offset": 0.05,
            "mixed_precision": "fp16",
            "validation_prompt": ("a photo of sks dog",),
            "output_dir": "models/dog",
        },
    ),
    "SimpleTuner": ForeignConfig(
        "config.json",
        json.dumps(SIMPLETUNER),
        {**simpletuner.TABLE, **simpletuner.DATASET_TABLE},
        {
            "pretrained_model_name_or_path": "Tongyi-MAI/Z-Image",
            "rank": 8,
            "mixer": "none",
            "lora_dropout": 0.1,
            "learning_rate": 2e-4,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 0,
            "max_train_steps": 300,
            "base_quantization": "int8",
            "resolution": 1000,
            "repeats": 4,
            "center_crop": False,
            "enable_bucket": False,
            "instance_prompt": "sks dog",
            "weighting_scheme": "logit_normal",
            "logit_mean": 0.0,
            "flow_shift": 3.0,
            "max_grad_norm": 2.0,
            "caption_dropout": 0.1,
            "adam_epsilon": 1e-6,
            "mixed_precision": "bf16",
            "seed": 42,
        },
    ),
}
"""By trainer: its file, and settings of the first step that it means."""


def write_config(trainer: str, changes: tuple[str, ...] = ()) -> Path:
    """Write a trainer's file and what it names into the working directory.

    changes: texts of the file, each followed by the text in its place
    """
    config = CONFIGS[trainer]
    Path("photos").mkdir(exist_ok=True)
    Path("regular").mkdir(exist_ok=True)
    Path("multidatabackend.json").write_text(json.dumps(BACKENDS))
    content = config.content
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in content
        content = content.replace(old, new)
    path = Path(config.file_name)
    path.write_text(content)
    return path
