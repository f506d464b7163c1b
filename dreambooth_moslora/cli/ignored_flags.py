"""Flags of other trainers that have no effect here.

A command that has them runs, and one line names them with what is done instead. A flag that would
change the training is none of them: it ends the command (`parser.FOREIGN_NAMES`).
"""

import argparse
from collections.abc import Sequence
from typing import Any

IGNORED = {
    # diffusers' scripts
    "dataloader_num_workers max_data_loader_n_workers vae_batch_size": (
        1,
        "photos are encoded once",
    ),
    "image_interpolation_mode": (1, "photos are resized by Lanczos"),
    "prior_generation_precision": (1, "class images are drawn in the run's precision"),
    "local_rank": (1, "the launcher's environment says it"),
    "output_kohya_format": (0, "a UNet's kohya file is always written"),
    "upcast_before_saving full_fp16 full_bf16": (0, "adapters are kept in fp32 all along"),
    "enable_npu_flash_attention xformers sdpa mem_eff_attn": (
        0,
        "PyTorch's own attention is used",
    ),
    "remote_text_encoder fsdp_text_encoder": (
        0,
        "prompts are encoded on this machine, on the CPU if need be",
    ),
    "pre_compute_text_embeddings cache_text_encoder_outputs cache_text_encoder_outputs_to_disk": (
        0,
        "frozen text encoders encode prompts once",
    ),
    "enable_vae_tiling": (0, "the VAE works in tiles wherever memory is short"),
    "set_grads_to_none": (0, "this is always so"),
    "skip_save_text_encoder": (0, "text encoders are saved only as adapters"),
    "validation_model_path": (1, "samples are drawn by the base"),
    "validation_num_inference_steps validation_guidance_scale sample_sampler": (
        1,
        "samples are drawn with the base's usual steps, guidance and scheduler",
    ),
    "validation_negative_prompt": (1, "samples are drawn without a negative prompt"),
    # kohya's sd-scripts
    "persistent_data_loader_workers cache_info": (0, "photos are encoded once"),
    "network_train_unet_only": (0, "the text encoders are frozen unless --train_text_encoder"),
    "save_precision": (1, "the adapter is saved in its own precision"),
    "save_model_as": (1, "adapters are always safetensors"),
    "save_state save_state_on_train_end": (0, "each checkpoint holds all that resuming needs"),
    "min_bucket_reso max_bucket_reso": (1, "sides lie between half and twice --resolution"),
    "masked_loss": (
        0,
        "name.mask.png beside a photo is always used, and --masks auto makes what is missing",
    ),
    "alpha_mask": (0, "a photo's transparency is its mask"),
    "no_half_vae": (0, "the VAE computes in fp32 where half precision overflows"),
    "lowram highvram fused_backward_pass": (0, "--memory chooses what is kept on the GPU"),
    "sample_at_first": (0, "samples are always drawn before the first step"),
    "training_comment metadata_title": (1, "the header holds numbers and trigger words"),
    # SimpleTuner
    "attention_mechanism": (1, "PyTorch's own attention is used"),
    "vae_enable_tiling vae_enable_slicing": (
        "?",
        "the VAE works in tiles wherever memory is short",
    ),
}
"""Flags -> how many values they take, as argparse's nargs, and what is done instead."""


class IgnoreFlag(argparse.Action):
    """Note the flag in the namespace's `ignored`, with its value and what is done `instead`."""

    def __init__(self, *args: Any, instead: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.instead = instead

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Add one text such as `--local_rank 0 (the launcher's environment says it)`."""
        values = [values] if isinstance(values, str) else values or []
        text = f"{' '.join([option_string, *values])} ({self.instead})"
        namespace.ignored = [*getattr(namespace, "ignored", []), text]


def add_ignored_flags(parser: argparse.ArgumentParser) -> None:
    """Let a parser accept the flags without effect; none is in its help."""
    for flags, (value_count, instead) in IGNORED.items():
        for flag in flags.split():
            parser.add_argument(
                f"--{flag}",
                action=IgnoreFlag,
                nargs=value_count,
                instead=instead,
                default=argparse.SUPPRESS,
                dest="ignored",
                help=argparse.SUPPRESS,
            )


def describe_ignored(ignored: Sequence[str]) -> list[str]:
    """Return the line that names all flags that were given without effect, if there were any."""
    return [f"Ignored, as they have no effect here: {', '.join(ignored)}."] if ignored else []
