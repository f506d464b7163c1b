"""The base model: loads the pipeline by its name, and encodes photos for the denoiser.

    name          --load_pipeline-->  the pipeline of its family (`family_facts`)
    pixels        --encode_image-->   latents (B, C, h, w), normalised as the denoiser expects them

Pixels are (B, 3, H, W) in [-1, 1].
"""

import json
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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dreambooth_moslora.base import decode, devices, families, model_files
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.quantized_files import QuantizedFile
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.family_facts import SDXL, FamilyFacts, get_facts

CONVERTER_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    SingleFileComponentError,
)
"""Errors of diffusers' converter for a damaged file, and for one of another model."""
LOADER_ERRORS = (
    *(OSError, ValueError, OverflowError, RuntimeError, SafetensorError),
    UnpicklingError,  # a .bin file that holds more than weights
)
"""Errors of the loaders for damaged and missing parts."""
ZERO_SNR_RESCALE = 0.7
"""How much of guidance's added contrast is removed (Lin et al. 2024, arXiv 2305.08891)."""


@cache
def ignore_kernels() -> None:
    """Let transformers overlook the attention that a model's configuration names, for the life of
    the process: it may be a kernel on the hub, which is code."""
    read = PreTrainedConfig.from_dict.__func__

    def from_dict(kind: type, config: dict[str, Any], **options: Any) -> Any:
        return read(kind, drop_attention_choice(config), **options)

    PreTrainedConfig.from_dict = classmethod(from_dict)


def drop_attention_choice(config: Any) -> Any:
    """A configuration, and those inside it, without entries that choose the attention."""
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
    """Load a base, or the base of that name, frozen and in evaluation mode.

    dtype: of the weights
    vae_dtype: of the autoencoder, which `base.vae` may name; the same by default
    has_denoiser: False leaves it to `load_denoiser`, but for a single file of a UNet

    Raises UserError when the base is missing, of no known family, or cannot be fetched.
    """
    ignore_kernels()

    # Refuse what no loader could load, by the files alone.
    base = Base.find(base)
    base.check()
    vae_dtype = vae_dtype or dtype

    try:
        # What the pipeline is given, in place of what it would load or make by itself.
        facts = base.facts or SDXL
        kind = getattr(diffusers, facts.pipeline)
        options = dict(base.version)
        if base.vae:
            options["vae"] = load_vae(base.vae, kind, vae_dtype, base.cache_dir)
        if "add_watermarker" in signature(kind.__init__).parameters:
            options["add_watermarker"] = False
        if not has_denoiser:
            options[facts.denoiser] = None

        # A single file of a UNet holds all parts; that of a transformer holds this one alone.
        if base.file and facts.style == "ddpm":
            pipeline = load_single_file(base.file, kind, options | {"dtype": dtype})
        else:
            options["dtype"] = {"default": dtype, "vae": vae_dtype}
            if base.file:
                pipeline = load_around_file(base.file, facts, dtype, options)
            else:
                pipeline = kind.from_pretrained(base.place, variant=base.variant, **options)
    except UserError:
        raise
    except LOADER_ERRORS as error:
        raise UserError(
            f"the base model {base.name} cannot be loaded: {format_error(error, 300)}"
        ) from error
    check_is_whole(pipeline, base.name, needs_denoiser=has_denoiser)

    # SDXL's own spacing (`leading`) would never use the last noise level.
    if has_zero_terminal_snr(pipeline):
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(
            scheduler.config, timestep_spacing="trailing"
        )

    # The loader of single files knows one dtype for all parts.
    if pipeline.vae.dtype != vae_dtype:
        pipeline.vae.to(vae_dtype)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def load_denoiser(pipeline: DiffusionPipeline, base: Base, dtype: torch.dtype) -> None:
    """Give a pipeline that was loaded without it the base's denoiser, frozen. Raises UserError."""
    facts = get_facts(type(pipeline).__name__)
    name = facts.denoiser
    try:
        if base.file:
            model = load_denoiser_file(base.file, facts, dtype)
        else:
            # Every other part is given, a model as None, and so it is not loaded again.
            others: dict[str, Any] = {}
            for part, value in pipeline.components.items():
                if part != name:
                    others[part] = None if isinstance(value, torch.nn.Module) else value
            options = base.version | {"variant": base.variant, "dtype": dtype}
            whole = type(pipeline).from_pretrained(base.place, **options, **others)
            model = getattr(whole, name)
    except UserError:
        raise
    except LOADER_ERRORS as error:
        raise UserError(
            f"the base model {base.name} cannot be loaded: {format_error(error, 300)}"
        ) from error
    pipeline.register_modules(**{name: model.requires_grad_(False).eval()})
    check_is_whole(pipeline, base.name, needs_encoders=False)


def load_vae(
    name: str | Path,
    pipeline: type[DiffusionPipeline],
    dtype: torch.dtype,
    cache_dir: str | Path | None,
) -> nn.Module:
    """Load another autoencoder.

    name: a folder or a hub id
    pipeline: the class of pipeline that it is for, which says the autoencoder's own class
    dtype: of its weights
    cache_dir: of the hub

    Raises UserError when it cannot be loaded.
    """
    try:
        kind = pipeline._get_signature_types()["vae"][0]
        return kind.from_pretrained(name, dtype=dtype, cache_dir=cache_dir)
    except LOADER_ERRORS as error:
        raise UserError(f"the VAE {name} cannot be loaded: {format_error(error, 300)}") from error


def load_around_file(
    path: Path, facts: FamilyFacts, dtype: torch.dtype, options: dict
) -> DiffusionPipeline:
    """The pipeline around a transformer's file. Encoders and VAE come from a diffusers folder of
    the same stem beside it, else from the hub.

    path: of the file
    facts: of its family
    dtype: of the transformer
    options: of the pipeline's loader. Where they name the denoiser, it comes later

    Raises UserError where the other parts are neither here nor fetched.
    """
    parts = {}
    if facts.denoiser not in options:
        parts[facts.denoiser] = load_denoiser_file(path, facts, dtype)
    home = model_files.find_configs(path) or facts.models[0].hub_id
    try:
        return getattr(diffusers, facts.pipeline).from_pretrained(home, **options, **parts)
    except OSError as error:
        raise UserError(explain_missing_parts(path, facts)) from error


def explain_missing_parts(path: Path, facts: FamilyFacts) -> str:
    """What a person can do about a transformer's file without the other parts."""
    model = facts.models[0].hub_id
    return (
        f"{path} holds {facts.denoiser_name} alone, and the other parts and configs are not here: "
        f"go online once, which fetches those of {model}, "
        f"or put a diffusers folder of that model into {path.with_suffix('')}."
    )


def load_denoiser_file(path: Path, facts: FamilyFacts, dtype: torch.dtype) -> nn.Module:
    """The model that denoises, of a file, in `dtype`. Raises UserError."""
    home = model_files.find_configs(path)
    kind = getattr(diffusers, facts.model)
    try:
        # diffusers drops scales, and splits and renames the weights: the scales come first.
        weights = load_single_file_checkpoint(str(path))
        if model_files.group_quantized(path):
            QuantizedFile(path).dequantize(weights, dtype)
        return kind.from_single_file(
            weights,
            config=str(home or facts.models[0].hub_id),
            subfolder=facts.denoiser,
            dtype=dtype,
        )
    except UserError:
        raise
    except CONVERTER_ERRORS as error:
        # Without configurations beside the file, it may be the hub that did not answer.
        if isinstance(error, OSError) and home is None:
            raise UserError(explain_missing_parts(path, facts)) from error
        raise UserError(
            f"{path}: diffusers cannot read {facts.denoiser_name} from it: "
            f"{format_error(error, 300)}"
        ) from error


def load_single_file(path: Path, kind: type[DiffusionPipeline], options: dict) -> DiffusionPipeline:
    """Load one checkpoint file, with the configs of the folder beside it, else the hub's. Raises
    UserError for configs that cannot be fetched, and for another file."""
    # diffusers drops the scales: a quantized UNet comes later.
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
        what = f"{facts.article} {facts.title} checkpoint that diffusers can read"
        raise UserError(f"{path} is not {what}: {format_error(error, 300)}") from error
    if is_quantized:
        unet = load_denoiser_file(path, get_facts(kind.__name__), options["dtype"])
        pipeline.register_modules(unet=unet)
    # A velocity model of SDXL says so by empty tensors of these names, which diffusers ignores.
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            marks = {"v_pred", "ztsnr"} & set(file.keys())
        if "v_pred" in marks:
            scheduler = pipeline.scheduler
            pipeline.scheduler = type(scheduler).from_config(
                scheduler.config,
                prediction_type="v_prediction",
                rescale_betas_zero_snr="ztsnr" in marks,
            )
    return pipeline


def has_zero_terminal_snr(pipeline: DiffusionPipeline) -> bool:
    """Whether the last noise level of a velocity base is pure noise."""
    config = pipeline.scheduler.config
    is_velocity = config.get("prediction_type") == "v_prediction"
    return is_velocity and bool(config.get("rescale_betas_zero_snr"))


def check_is_whole(
    pipeline: DiffusionPipeline,
    name: str | Path,
    needs_denoiser: bool = True,
    needs_encoders: bool = True,
) -> None:
    """Raises UserError for a part that is missing, and for a weight that the loader left without
    memory.

    pipeline: as it was loaded
    name: of the base, for the message
    needs_denoiser: False where it is loaded later
    needs_encoders: False where they were used and let go
    """
    facts = get_facts(type(pipeline).__name__)
    needed = []
    if needs_denoiser:
        needed.append(facts.denoiser)
    if needs_encoders:
        needed += facts.encoders

    # Parts: diffusers loads a pipeline whose index has null for one.
    lacking = [part for part in needed if getattr(pipeline, part) is None]
    if facts.needs_sizes and (lacking or pipeline.unet.config.addition_embed_type != "text_time"):
        raise UserError(
            f"{name} is not an SDXL base model "
            "(two text encoders and size conditioning are needed)."
        )
    if lacking:
        raise UserError(f"the base model {name} is not whole: it has no {lacking[0]}.")

    # Weights: what the files lack stays on meta.
    for part, model in pipeline.components.items():
        if not isinstance(model, nn.Module):
            continue
        for weight, value in model.named_parameters():
            if value.is_meta:
                lack = f"the files of its {part} have no {weight}"
                raise UserError(f"the base model {name} is not whole: {lack}.")


def get_default_resolution(pipeline: DiffusionPipeline) -> int:
    """Side in pixels of the base's training images: 1024 for SDXL, 128 for the embedded base."""
    if toy_bases.is_toy(get_base_name(pipeline)):
        return toy_bases.RESOLUTION_PX
    facts = get_facts(type(pipeline).__name__)
    if facts.style == "flow":
        return facts.resolution_px
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def get_default_guidance(pipeline: DiffusionPipeline) -> float:
    """The family's usual guidance; the embedded base has its own."""
    return toy_bases.get_base_guidance(get_base_name(pipeline), get_facts(type(pipeline).__name__))


def get_base_name(pipeline: DiffusionPipeline) -> str:
    """What it was loaded from: a folder, a file or a hub id."""
    return str(pipeline.config.get("_name_or_path", ""))


def get_guidance_rescale(pipeline: DiffusionPipeline) -> float:
    """The pipeline's argument of this name: guidance overexposes pictures of bases with zero
    terminal SNR."""
    return ZERO_SNR_RESCALE if has_zero_terminal_snr(pipeline) else 0.0


SDXL_FAMILY = families.SDXL(SDXL)
"""Whose latents those of most UNets are."""


@torch.no_grad()
def encode_image(vae: nn.Module, pixels: Tensor, family: families.Family = SDXL_FAMILY) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) for the denoiser, fp32: the mean of
    the VAE's posterior. A VAE that gives NaN is converted to fp32 for good. Raises UserError when
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
"""Entries of a UNet's configuration by which an adapter fits it."""


def get_architecture(denoiser: nn.Module) -> dict[str, object]:
    """The shape of a denoiser, JSON-able: SHAPE of a UNet, every whole number of a transformer's
    configuration."""
    config = dict(denoiser.config)
    if "block_out_channels" in config:
        found = {key: config[key] for key in UNET_SHAPE_ENTRIES}
    else:
        found = {key: value for key, value in config.items() if type(value) is int}

    # JSON has no tuples: what is read back must equal what was written.
    return json.loads(json.dumps(found))
