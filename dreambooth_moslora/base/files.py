"""Readers of a base's files: its weight files, their headers and its configurations. `base.base`
has what they say."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import families

LFS_POINTER = b"version https://git-lfs.github.com/spec"
"""How a file begins whose content git-lfs has not fetched."""
USUAL_VAE_LEVELS = 4
"""Resolutions inside a VAE. Each but the last halves the side."""
SMALL_BASE_PX = 256
"""A base of at most this resolution needs no care with GPU memory."""
HUB_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
"""owner/model, as the hub allows them."""
SINGLE_FILE_SUFFIXES = {".safetensors", ".ckpt"}
"""Of checkpoints that hold a whole model, or its denoiser."""
DENOISER_PREFIX = "model.diffusion_model."
"""How the names of the denoiser's tensors begin in a whole checkpoint."""
INDEX = "model_index.json"
"""diffusers' file that names the parts of a base."""


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a base's component that are loaded: the variant's, if there are any."""
    for suffix in (".safetensors", ".bin"):
        files = sorted(folder.glob(f"*{suffix}"))
        if not files:
            continue

        # The variant's, else the plain ones, else whatever is there.
        chosen = [file for file in files if variant and f".{variant}" in file.name]
        plain = [file for file in files if "." not in file.stem]
        return chosen or plain or files
    return []


def variants_in(folder: Path) -> list[str]:
    """The variants of a component's safetensors files: `fp16` of model.fp16.safetensors, also where
    it is split."""
    names = [file.stem.partition(".")[2] for file in folder.glob("*.safetensors")]
    return sorted({name.partition("-")[0] for name in names if name})


def tensor_shapes(folder: Path, variant: str | None = None) -> dict[str, list[int]]:
    """Tensor's name -> shape for a component's folder; {} for another format than safetensors, and
    for no files. Raises UserError for a damaged file."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder, variant):
        shapes |= shapes_in(file)
    return shapes


def shapes_in(path: Path) -> dict[str, list[int]]:
    """{tensor's name: its shape} of a safetensors file; {} for another format. Raises UserError for
    a damaged one."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is a git-lfs pointer, the weights are not here: "
                "fetch them with `git lfs pull`."
            )
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged, cut short or not a safetensors file ({error}): fetch it again."
        ) from None


def is_hub_id(name: str) -> bool:
    """`owner/model-1.0` is one despite its dot; `owner/model.safetensors`, `./model` and what the
    hub would not take as a name are paths."""
    return bool(HUB_NAME.fullmatch(name)) and Path(name).suffix not in SINGLE_FILE_SUFFIXES


def unet_side(folder: Path) -> int | None:
    """The side in px by the configuration of the UNet, and of the VAE, which may be another's; None
    where it does not say it."""
    try:
        # The UNet's side is in latents.
        latent = int(read_json(folder / "unet" / "config.json")["sample_size"])

        # The VAE says how many px are in one of them.
        vae = folder / "vae" / "config.json"
        levels = USUAL_VAE_LEVELS
        if vae.is_file():
            levels = len(read_json(vae)["block_out_channels"])
        return latent * 2 ** (levels - 1) if latent > 0 else None
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None


def facts_by_names(path: Path, tensors: Mapping[str, list[int]]) -> families.Facts:
    """The family of a single file, by the names of its tensors {name: shape}. Raises UserError for
    a file that no family claims."""
    # Another format than safetensors does not tell its tensors.
    if not tensors:
        return families.SDXL
    names = {name.removeprefix(DENOISER_PREFIX) for name in tensors}
    for facts in families.FAMILIES:
        if facts.file_mark in names:
            return facts
    titles = ", ".join(facts.title for facts in families.FAMILIES)
    raise UserError(
        f"{path} holds weights of no family that is known here, but {min(names):.80}: "
        f"give a file of {titles}, in the layout of its authors."
    )


def check_is_dense(folder: Path) -> None:
    """Raises UserError for a part of a base whose weights are quantised already."""
    config = folder / "config.json"
    if config.is_file() and (found := read_json(config).get("quantization_config")):
        how = found.get("quant_method", "") if isinstance(found, dict) else found
        raise UserError(
            f"{folder} is quantised already ({how!s:.40}): give the base in full or half "
            "precision, which --base_quantization quantises."
        )


def facts_in(index: dict) -> families.Facts:
    """The family of a base by its `model_index.json`. Raises UserError for one that cannot be
    trained."""
    name = str(index.get("_class_name", ""))

    # SDXL has pipelines for other tasks, such as inpainting, whose parts are the same.
    if not name or name.startswith("StableDiffusionXL"):
        name = "StableDiffusionXLPipeline"
    return families.facts_of(name)


def check_weights(folder: Path, variant: str | None = None) -> None:
    """Raises UserError for a part of a base without weights."""
    if not weight_files(folder, variant):
        lack = "there is neither a .safetensors nor a .bin file in it"
        raise UserError(f"{folder} has no weights: {lack}.")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no names and values.")
    return found


def configs_beside(checkpoint: Path) -> Path | None:
    """The folder of the same stem beside a single-file checkpoint, if it holds a diffusers model's
    configs."""
    folder = checkpoint.with_suffix("")
    return folder if (folder / INDEX).is_file() else None
