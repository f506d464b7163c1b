"""Readers of a base's files: its weight files, their headers and its configurations, for
`base.base`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import family_facts

LFS_POINTER = b"version https://git-lfs.github.com/spec"
"""First bytes of a file whose content git-lfs has not fetched."""
SD3_TENSOR = "transformer_blocks.0.attn.add_q_proj.weight"
MAX_SMALL_BASE_PX = 256
"""Resolution up to which a base needs no memory plan."""
HUB_NAME_PATTERN = re.compile(
    r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII
)
SINGLE_FILE_SUFFIXES = {".safetensors", ".ckpt"}
DENOISER_PREFIX = "model.diffusion_model."
"""Prefix of the denoiser's tensors in a whole checkpoint."""
FILE_PREFIXES = (DENOISER_PREFIX, "net.")
"""The same, and that of Cosmos, which Anima's files have."""
QUANTIZED = re.compile(
    "SCB|weight_format|comfy_quant|scaled_fp8|scale_(weight|input)"
    r"|(weight|input|output|pre_quant)?_scale(_\w+)?"
)
"""Last parts of the names of tensors that exist only beside quantized weights."""
INDEX_NAME = "model_index.json"
"""File of diffusers that lists the parts of a base."""
MODULAR_INDEX_NAME = "modular_model_index.json"
"""The same of a modular pipeline."""
INDEX_NAMES = (INDEX_NAME, MODULAR_INDEX_NAME)
"""A folder with both is read as the ordinary pipeline, which more families have."""


def list_weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """List the weight files of a component that are loaded: the variant's, else the plain ones,
    else all."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    of_variant = [file for file in files if variant and f".{variant}" in file.name]
    return of_variant or [file for file in files if "." not in file.stem] or files


def list_variants(folder: Path) -> list[str]:
    """List the variants of a component's safetensors files, such as `fp16` of
    model.fp16.safetensors, also if they are split."""
    names = [file.stem.partition(".")[2] for file in folder.glob("*.safetensors")]
    return sorted({name.partition("-")[0] for name in names if name})


def read_folder_shapes(folder: Path, variant: str | None = None) -> dict[str, list[int]]:
    """Return tensor's name -> shape for a component's folder; {} for another format than
    safetensors, and without files. Raises UserError for a damaged file."""
    shapes: dict[str, list[int]] = {}
    for file in list_weight_files(folder, variant):
        shapes |= read_shapes(file)
    return shapes


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return tensor's name -> shape of a safetensors file; {} for another format. Raises UserError
    for a damaged file."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is a git-lfs pointer, the weights are not here: "
                "fetch them with `git lfs pull`."
            )
    if path.suffix != ".safetensors":
        return {}
    try:
        return read_header(path).shapes
    except UserError as error:
        raise UserError(f"{path}: {error}: fetch it again.") from None


def find_snapshot(
    hub_id: str, file: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path | None:
    """Return the folder of the hub's cache that has this file of a model, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, file, revision=revision, cache_dir=cache_dir)
    return Path(path).parent if isinstance(path, str) else None


def find_indexed_snapshot(hub_id: str, **version: Any) -> Path | None:
    """Return the folder of the hub's cache that has an index of this model, or None."""
    folders = (find_snapshot(hub_id, name, **version) for name in INDEX_NAMES)
    return next(filter(None, folders), None)


def find_index(folder: Path) -> Path | None:
    """Return the file in a base's folder that lists its parts, or None."""
    files = (folder / name for name in INDEX_NAMES)
    return next((file for file in files if file.is_file()), None)


def group_quantized(path: Path) -> dict[str, dict[str, str]]:
    """Return {layer: {last part of a tensor's name: its dtype}} of the layers in a safetensors file
    whose weights are quantized; {} for another format."""
    if path.suffix != ".safetensors":
        return {}
    layers: dict[str, dict[str, str]] = {}
    dtypes = read_header(path).dtypes
    for name, dtype in dtypes.items():
        layer, _, part = name.rpartition(".")
        if layer in dtypes:  # `x.weight.scale` belongs to `x.weight`
            layer, _, tensor = layer.rpartition(".")
            part = f"{tensor}.{part}"

        # A weight of 8 bits or of integers has its scale beside it, whatever that is called.
        is_integer = part == "weight" and dtype.startswith(("I", "U"))
        weight_dtype = dtypes.get(f"{layer}.weight", "")
        is_scale = part not in ("weight", "bias") and weight_dtype.startswith(("I", "U", "F8"))
        if dtype in ("I8", "U8") or is_integer or is_scale or QUANTIZED.fullmatch(part):
            layers.setdefault(layer, {})[part] = dtype
            if (weight := f"{layer}.weight") in dtypes:
                layers[layer]["weight"] = dtypes[weight]
    return layers


def is_hub_id(name: str) -> bool:
    """Return whether a name can be an id of the hub: `owner/model-1.0` can despite its dot,
    `owner/model.safetensors` and `./model` cannot."""
    return bool(HUB_NAME_PATTERN.fullmatch(name)) and Path(name).suffix not in SINGLE_FILE_SUFFIXES


def read_unet_resolution(folder: Path) -> int | None:
    """Return the side of the training images in px, by the configurations of the UNet and the VAE;
    None if they do not state it."""
    try:
        # The UNet's configuration has the side in latents, the VAE's decides the px of each.
        latents = int(read_json(folder / "unet" / "config.json")["sample_size"])
        # A folder may have no VAE of its own; SDXL's has four levels.
        vae = folder / "vae" / "config.json"
        levels = len(read_json(vae)["block_out_channels"]) if vae.is_file() else 4
        return latents * 2 ** (levels - 1) if latents > 0 else None
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None


class OtherModel(NamedTuple):
    """Unsupported model whose files resemble those of a family.

    title: of the model
    keys: tensors that its file has
    lacks: tensor that its file does not have
    inputs: columns of `img_in.weight`; 0 for any number
    pattern: part of the file's or model's name; needed if the tensors are those of a family
    """

    title: str
    keys: tuple[str, ...] = ()
    lacks: str = ""
    inputs: int = 0
    pattern: str = ""

    def is_name_match(self, name: str) -> bool:
        """Return whether a file or model of this name can be this model."""
        return bool(re.search(self.pattern, name.lower()))

    def is_match(self, name: str, shapes: Mapping[str, list[int]]) -> bool:
        """Return whether a file of this name with these tensors is this model."""
        columns = shapes.get("img_in.weight", [0])[-1]
        has_keys = bool(self.keys) and shapes.keys() >= {*self.keys} and self.lacks not in shapes
        return has_keys and self.inputs in (0, columns) and self.is_name_match(name)


FLUX1_TENSORS = ("vector_in.in_layer.weight", "double_blocks.0.img_attn.norm.key_norm.scale")
FLUX3_DISTILLED = "the distilled form of flux-3-image-klein-base"
OTHER_MODELS = (
    OtherModel("FLUX.1 Fill", FLUX1_TENSORS, inputs=384),
    OtherModel("FLUX.1 Depth or Canny", FLUX1_TENSORS, inputs=128),
    OtherModel("FLUX.1 schnell", FLUX1_TENSORS, lacks="guidance_in.in_layer.bias"),
    OtherModel(
        "FLUX.2 dev", ("single_stream_modulation.lin.weight", "guidance_in.in_layer.weight")
    ),
    OtherModel("Chroma", ("distilled_guidance_layer.in_proj.bias",)),
    OtherModel("Wan", ("head.modulation",)),
    OtherModel("HiDream", ("double_stream_blocks.0.block.adaLN_modulation.1.bias",)),
    OtherModel("FLUX.1 in diffusers' layout", ("single_transformer_blocks.0.proj_mlp.weight",)),
    OtherModel("Stable Diffusion 3 in diffusers' layout", ("pos_embed.proj.weight", SD3_TENSOR)),
    OtherModel(FLUX3_DISTILLED, ("ref_time_in.in_layer.weight",)),
    OtherModel(FLUX3_DISTILLED, pattern=r"flux-?3-image-klein$"),
    OtherModel("a GGUF file", pattern="gguf"),
)
"""Unsupported models, which are tried before the families. A hub id without files is compared by
the pattern alone."""


def detect_file_facts(path: Path, tensors: Mapping[str, list[int]]) -> family_facts.FamilyFacts:
    """Return the family of a single file, by its tensors {name: shape}. Raises UserError for a
    model of no family."""
    # The tensors of another format than safetensors are not read.
    if not tensors:
        return family_facts.SDXL

    # Try the unsupported models first: some have tensors of a family.
    shapes = {strip_prefix(name): shape for name, shape in tensors.items()}
    for model in OTHER_MODELS:
        if model.is_match(path.stem, shapes):
            raise UserError(
                f"{path} is {model.title}, which is no base here: {format_file_advice()}."
            )

    # Each family has a tensor that no other has.
    for facts in family_facts.FAMILIES:
        if facts.marker_tensor in shapes:
            return facts
    raise UserError(
        f"{path} holds weights of no family that is known here, but {min(shapes):.80}: "
        f"{format_file_advice()}."
    )


def strip_prefix(name: str) -> str:
    """Return the name of a denoiser's tensor without the prefix that it has in some files."""
    return next((name.removeprefix(text) for text in FILE_PREFIXES if name.startswith(text)), name)


def format_file_advice() -> str:
    """Format the advice that names the families."""
    titles = ", ".join(facts.title for facts in family_facts.FAMILIES)
    return f"give a file of {titles}, in the layout of its authors"


def detect_hub_facts(name: str) -> family_facts.FamilyFacts | None:
    """Return the flow family whose title is part of a hub id, or None. Raises UserError for the
    name of an unsupported model."""
    for model in OTHER_MODELS:
        if model.pattern and model.is_name_match(name):
            raise UserError(f"{name} is {model.title} by its name, which is no base here.")
    for facts in family_facts.FAMILIES:
        # Any separators may be between the letters; Animagine is no Anima.
        letters = re.sub(r"[^a-z0-9]", "", facts.title.lower())
        title = "[^a-z0-9]*".join(letters) + "(?![a-z])"
        if facts.style == "flow" and re.search(title, name.lower()):
            return facts
    return None


def check_is_dense(folder: Path) -> None:
    """Raise UserError for a part of a base whose weights are quantised already."""
    config = folder / "config.json"
    if config.is_file() and (settings := read_json(config).get("quantization_config")):
        method = settings.get("quant_method", "") if isinstance(settings, dict) else settings
        raise UserError(
            f"{folder} is quantised already ({method!s:.40}): give the base in full or half "
            "precision, which --base_quantization quantises."
        )


def get_index_facts(index: dict) -> family_facts.FamilyFacts:
    """Return the family of a base by its index. Raises UserError for a family that
    cannot be trained."""
    name = str(index.get("_class_name", ""))
    if "Distilled" in name:
        facts = family_facts.get_facts(name.replace("Distilled", ""))
        raise UserError(
            f"the base is {facts.title} distilled to a few steps, which needs a timestep more: "
            f"take the base model of its family, {facts.models[0].hub_id}."
        )

    # SDXL has pipelines for other tasks, such as inpainting, whose parts are the same.
    if not name or name.startswith("StableDiffusionXL"):
        name = "StableDiffusionXLPipeline"
    return family_facts.get_facts(name)


def find_configs(checkpoint: Path) -> Path | None:
    """Return the folder of the same stem beside a single-file checkpoint, or None if it has no
    diffusers index."""
    folder = checkpoint.with_suffix("")
    return folder if find_index(folder) else None
