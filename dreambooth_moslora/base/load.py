"""Load a base's pipeline by its name, and encode photos with its VAE.

    name          --load_pipeline-->  pipeline of its family (`family_facts`)
    pixels        --encode_image-->   latents (B, C, h, w), normalised as the denoiser expects

Pixels are (B, 3, H, W) in [-1, 1].
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    load_single_file_checkpoint,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dreambooth_moslora.base import decode, devices, families, model_files, modular
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.quantized_files import QuantizedFile
from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.settings.family_facts import SDXL, FamilyFacts, get_facts

CONVERTER_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    SingleFileComponentError,
)
LOADER_ERRORS = (
    *(OSError, ValueError, OverflowError, RuntimeError, SafetensorError),
    UnpicklingError,  # a .bin file that holds more than weights
)
"""Errors of the loaders for damaged and missing parts."""
ZERO_SNR_RESCALE = 0.7
"""Share of guidance's added contrast that is removed (Lin et al. 2024, arXiv 2305.08891)."""


@cache
def ignore_kernels() -> None:
    """Make transformers ignore the attention that a model's configuration names, for the life of
    the process: it may be a kernel from the hub, which is code."""
    original = PreTrainedConfig.from_dict.__func__

    def from_dict(cls: type, config: dict[str, Any], **options: Any) -> Any:
        return original(cls, drop_attention_choice(config), **options)

    PreTrainedConfig.from_dict = classmethod(from_dict)


def drop_attention_choice(config: Any) -> Any:
    """Drop the entries that choose the attention from a configuration and from those inside it."""
    if not isinstance(config, dict):
        return config
    return {
        name: drop_attention_choice(value)
        for name, value in config.items()
        if "attn_implementation" not in str(name)
    }


def load_pipeline(
    base: Base | str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    has_denoiser: bool = True,
) -> DiffusionPipeline:
    """Load a base by its name, frozen and in evaluation mode.

    dtype: of the weights
    vae_dtype: of the autoencoder; default: `dtype`
    has_denoiser: False leaves the denoiser to `load_denoiser`, except in a single file of a UNet

    Raises UserError if the base is missing, of an unknown family, or cannot be fetched.
    """
    ignore_kernels()

    # Refuse by its files what no loader could load.
    base = Base.find(base)
    base.check()
    vae_dtype = vae_dtype or dtype

    with explain_loader_errors(f"the base model {base.name}"):
        # Options of the loader: another VAE, no watermark, perhaps no denoiser.
        facts = base.facts or SDXL
        kind = get_pipeline_class(facts)
        options = dict(base.version)
        if base.vae:
            options["vae"] = load_vae(base.vae, kind, vae_dtype, base.cache_dir)
        if "add_watermarker" in signature(kind.__init__).parameters:
            options["add_watermarker"] = False
        if not has_denoiser:
            options[facts.denoiser] = None

        # A single file of a UNet holds all parts; a transformer's file holds the transformer alone.
        if base.file and facts.style == "ddpm":
            pipeline = load_single_file(base.file, kind, options | {"dtype": dtype})
        else:
            options["dtype"] = {"default": dtype, "vae": vae_dtype}
            if base.file:
                pipeline = load_around_file(base.file, facts, dtype, options)
            else:
                pipeline = kind.from_pretrained(base.load_path, variant=base.variant, **options)
    check_is_whole(pipeline, base.name, needs_denoiser=has_denoiser)

    # SDXL's default spacing (`leading`) would never use the last noise level.
    if has_zero_terminal_snr(pipeline):
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(
            scheduler.config, timestep_spacing="trailing"
        )

    # The loader of single files takes one dtype for all parts.
    if pipeline.vae.dtype != vae_dtype:
        pipeline.vae.to(vae_dtype)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def get_pipeline_class(facts: FamilyFacts) -> type[DiffusionPipeline]:
    """Return the class that loads and runs a family's bases: diffusers' own, or the ordinary
    pipeline with the parts of a modular one."""
    return getattr(modular, facts.pipeline, None) or getattr(diffusers, facts.pipeline)


def load_denoiser(pipeline: DiffusionPipeline, base: Base, dtype: torch.dtype) -> None:
    """Load the base's denoiser, frozen, into a pipeline that was loaded without it. Raises
    UserError if it cannot be loaded."""
    facts = get_facts(type(pipeline).__name__)
    name = facts.denoiser
    with explain_loader_errors(f"the base model {base.name}"):
        # Load it from the single file, or by a pipeline of which nothing else is loaded.
        if base.file:
            model = load_denoiser_file(base.file, facts, dtype)
        else:
            # Pass each other part, models as None, so that none is loaded again.
            parts = {
                part: None if isinstance(value, nn.Module) else value
                for part, value in pipeline.components.items()
                if part != name
            }
            options = base.version | {"variant": base.variant, "dtype": dtype}
            model = getattr(
                type(pipeline).from_pretrained(base.load_path, **options, **parts), name
            )

    # Put it into the pipeline.
    pipeline.register_modules(**{name: model.requires_grad_(False).eval()})
    check_is_whole(pipeline, base.name, needs_encoders=False)


def load_vae(
    name: str | Path,
    pipeline: type[DiffusionPipeline],
    dtype: torch.dtype,
    cache_dir: str | Path | None,
) -> nn.Module:
    """Load an autoencoder that replaces the base's.

    name: folder or hub id
    pipeline: class of the pipeline, whose signature names the autoencoder's class
    cache_dir: of the hub

    Raises UserError if it cannot be loaded.
    """
    with explain_loader_errors(f"the VAE {name}"):
        kind = pipeline._get_signature_types()["vae"][0]
        return kind.from_pretrained(name, dtype=dtype, cache_dir=cache_dir)


@contextmanager
def explain_loader_errors(subject: str) -> Iterator[None]:
    """Raise UserError, which says that `subject` cannot be loaded, for a loader's error."""
    try:
        yield
    except UserError:
        raise
    except LOADER_ERRORS as error:
        raise UserError(f"{subject} cannot be loaded: {format_error(error, 300)}") from error


def load_around_file(
    path: Path, facts: FamilyFacts, dtype: torch.dtype, options: dict
) -> DiffusionPipeline:
    """Load the pipeline around a transformer's file. Encoders and VAE come from a diffusers folder
    of the same stem beside the file, else from the hub.

    dtype: of the transformer
    options: of the pipeline's loader; if they contain the denoiser, it is loaded later

    Raises UserError if the other parts are neither on this machine nor fetched.
    """
    parts = {}
    if facts.denoiser not in options:
        parts[facts.denoiser] = load_denoiser_file(path, facts, dtype)
    home = model_files.find_configs(path) or facts.models[0].hub_id
    try:
        for part, _ in facts.file_parts:
            parts[part] = load_file_part(path, facts, part, dtype)
        return get_pipeline_class(facts).from_pretrained(home, **options, **parts)
    except OSError as error:
        raise UserError(explain_missing_parts(path, facts)) from error


def explain_missing_parts(path: Path, facts: FamilyFacts) -> str:
    """Return the message for a transformer's file without the pipeline's other parts."""
    model = facts.models[0].hub_id
    return (
        f"{path} holds {facts.denoiser_name} alone, and the other parts and configs are not here: "
        f"go online once, which fetches those of {model}, "
        f"or put a diffusers folder of that model into {path.with_suffix('')}."
    )


def load_denoiser_file(path: Path, facts: FamilyFacts, dtype: torch.dtype) -> nn.Module:
    """Load the denoiser of a single file. Raises UserError if diffusers cannot read it."""
    home = model_files.find_configs(path)
    kind = getattr(diffusers, facts.model)
    try:
        weights = read_file_parts(path, facts, dtype)[facts.denoiser]
        options = {}
        if facts.counted_blocks:
            blocks = (re.match(facts.counted_blocks, name) for name in weights)
            options["num_layers"] = 1 + max(int(block[1]) for block in blocks if block)
        return kind.from_single_file(
            weights,
            config=str(home or facts.models[0].hub_id),
            subfolder=facts.denoiser,
            dtype=dtype,
            **options,
        )
    except UserError:
        raise
    except CONVERTER_ERRORS as error:
        # Without configurations beside the file, perhaps the hub did not answer.
        if isinstance(error, OSError) and home is None:
            raise UserError(explain_missing_parts(path, facts)) from error
        raise UserError(
            f"{path}: diffusers cannot read {facts.denoiser_name} from it: "
            f"{format_error(error, 300)}"
        ) from error


def read_file_parts(
    path: Path, facts: FamilyFacts, dtype: torch.dtype
) -> dict[str, dict[str, Tensor]]:
    """Return the dense weights of each part in a transformer's file. Raises UserError for an
    unsupported quantized format."""
    # diffusers drops scales, and splits and renames weights: apply the scales first.
    weights = load_single_file_checkpoint(str(path))
    if model_files.group_quantized(path):
        QuantizedFile(path).dequantize(weights, dtype)

    # Take out the other parts: diffusers would rename them as if they were the transformer's.
    parts = {facts.denoiser: weights}
    for part, prefix in facts.file_parts:
        names = [name for name in weights if model_files.strip_prefix(name).startswith(prefix)]
        parts[part] = {name.partition(prefix)[2]: weights.pop(name) for name in names}
    return parts


def load_file_part(path: Path, facts: FamilyFacts, part: str, dtype: torch.dtype) -> nn.Module:
    """Load another part of a transformer's file. Raises OSError if its configuration is neither on
    this machine nor fetched, and RuntimeError if the file does not fit it."""
    kind = get_pipeline_class(facts)._get_signature_types()[part][0]
    home = model_files.find_configs(path) or facts.models[0].hub_id
    model = kind.from_config(kind.load_config(str(home), subfolder=part))
    model.load_state_dict(read_file_parts(path, facts, dtype)[part])
    return model.to(dtype)


def load_single_file(path: Path, kind: type[DiffusionPipeline], options: dict) -> DiffusionPipeline:
    """Load a UNet's checkpoint file, with the configs of the folder beside it, else the hub's.
    Raises UserError for configs that cannot be fetched, and for a file of another model."""
    # diffusers drops the scales: a quantized UNet is loaded later.
    is_quantized = bool(model_files.group_quantized(path))
    if is_quantized:
        options = options | {"unet": None}
    configs = model_files.find_configs(path)
    local = {} if configs is None else {"config": str(configs)}
    try:
        pipeline = kind.from_single_file(str(path), **options, **local)
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{path} holds weights alone, and the configs that belong to them "
            "could not be fetched from the hub: go online once, "
            "or put the .json and tokenizer files of a diffusers folder of that model "
            f"into {path.with_suffix('')}."
        ) from error
    except CONVERTER_ERRORS as error:
        facts = get_facts(kind.__name__)
        raise UserError(
            f"{path} is not {facts.article} {facts.title} checkpoint that diffusers can read: "
            f"{format_error(error, 300)}"
        ) from error
    if is_quantized:
        unet = load_denoiser_file(path, get_facts(kind.__name__), options["dtype"])
        pipeline.register_modules(unet=unet)

    # Empty tensors of these names mark SDXL's velocity models. diffusers ignores them.
    if path.suffix == ".safetensors":
        marks = {"v_pred", "ztsnr"} & read_header(path).shapes.keys()
        if "v_pred" in marks:
            scheduler = pipeline.scheduler
            pipeline.scheduler = type(scheduler).from_config(
                scheduler.config,
                prediction_type="v_prediction",
                rescale_betas_zero_snr="ztsnr" in marks,
            )
    return pipeline


def has_zero_terminal_snr(pipeline: DiffusionPipeline) -> bool:
    """Return whether the last noise level of a velocity base is pure noise."""
    config = pipeline.scheduler.config
    is_velocity = config.get("prediction_type") == "v_prediction"
    return is_velocity and bool(config.get("rescale_betas_zero_snr"))


def check_is_whole(
    pipeline: DiffusionPipeline,
    name: str | Path,
    needs_denoiser: bool = True,
    needs_encoders: bool = True,
) -> None:
    """Raise UserError for a missing part, and for a weight that the loader left without memory.

    name: of the base, for the message
    needs_denoiser: False if it is loaded later
    needs_encoders: False if they were used and freed
    """
    facts = get_facts(type(pipeline).__name__)
    needed = [facts.denoiser] * needs_denoiser + list(facts.encoders) * needs_encoders

    # Check the parts: diffusers loads a pipeline whose index has null for a part.
    lacking = [part for part in needed if getattr(pipeline, part) is None]
    if facts.needs_sizes and (lacking or pipeline.unet.config.addition_embed_type != "text_time"):
        raise UserError(
            f"{name} is not an SDXL base model "
            "(two text encoders and size conditioning are needed)."
        )
    if lacking:
        raise UserError(f"the base model {name} is not whole: it has no {lacking[0]}.")

    # Check the weights: those that the files lack stay on the meta device.
    for part, model in pipeline.components.items():
        if not isinstance(model, nn.Module):
            continue
        for weight, value in model.named_parameters():
            if value.is_meta:
                raise UserError(
                    f"the base model {name} is not whole: the files of its {part} have no {weight}."
                )


def get_guidance_rescale(pipeline: DiffusionPipeline) -> float:
    """Return the pipeline's `guidance_rescale`: guidance overexposes the images of a base with zero
    terminal SNR."""
    return ZERO_SNR_RESCALE if has_zero_terminal_snr(pipeline) else 0.0


SDXL_FAMILY = families.SDXL(SDXL)


@torch.no_grad()
def encode_image(vae: nn.Module, pixels: Tensor, family: families.Family = SDXL_FAMILY) -> Tensor:
    """Encode pixels (B, 3, H, W) in [-1, 1] to latents (B, C, h, w) for the denoiser, fp32: the
    mean of the VAE's posterior. A VAE that gives NaN stays converted to fp32. Raises UserError if
    even fp32 gives NaN."""
    with decode.enable_tiling(
        vae,
        size_px=pixels.shape[-2:],
        device=vae.device,
        bytes_per_pixel=devices.ENCODER_BYTES_PER_PIXEL,
    ):
        latents = decode.run_with_fp32_fallback(vae, lambda: family.encode_latents(vae, pixels))
    if not latents.isfinite().all():
        raise UserError(
            "the VAE gives NaN for a photo even in float32: "
            "its weights are broken; use another VAE."
        )
    return latents


UNET_SHAPE_ENTRIES = (
    "in_channels",
    "block_out_channels",
    "cross_attention_dim",
    "transformer_layers_per_block",
)
"""Entries of a UNet's configuration that decide whether an adapter fits it."""


def get_architecture(denoiser: nn.Module) -> dict[str, object]:
    """Return the entries of a denoiser's configuration that decide its shapes, as JSON:
    `UNET_SHAPE_ENTRIES` of a UNet, every integer of a transformer."""
    config = dict(denoiser.config)
    if "block_out_channels" in config:
        shape_entries = {key: config[key] for key in UNET_SHAPE_ENTRIES}
    else:
        shape_entries = {key: value for key, value in config.items() if type(value) is int}

    # JSON has no tuples: the entries must equal those read back from a file.
    return json.loads(json.dumps(shape_entries))
