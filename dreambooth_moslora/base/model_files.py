"""Readers of a base's files: its weight files, their headers and its configurations. `base.base`
has what they say."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import family_facts

LFS_POINTER = b"version https://git-lfs.github.com/spec"
"""How a file begins whose content git-lfs has not fetched."""
SD3_TENSOR = "transformer_blocks.0.attn.add_q_proj.weight"
"""A tensor of SD 3 in diffusers' layout."""
DEFAULT_VAE_LEVELS = 4
"""Resolutions inside a VAE. Each but the last halves the side."""
MAX_SMALL_BASE_PX = 256
"""A base of at most this resolution needs no care with GPU memory."""
HUB_NAME_PATTERN = re.compile(
    r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII
)
"""owner/model, as the hub allows them."""
SINGLE_FILE_SUFFIXES = {".safetensors", ".ckpt"}
"""Of checkpoints that hold a whole model, or its denoiser."""
DENOISER_PREFIX = "model.diffusion_model."
"""How the names of the denoiser's tensors begin in a whole checkpoint."""
QUANTIZED = re.compile(
    "SCB|weight_format|comfy_quant|scaled_fp8|scale_(weight|input)"
    r"|(weight|input|output|pre_quant)?_scale(_\w+)?"
)
"""Last parts of names that only quantized weights have beside them."""
INDEX_NAME = "model_index.json"
"""diffusers' file that names the parts of a base."""


def list_weight_files(folder: Path, variant: str | None = None) -> list[Path]:
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


def list_variants(folder: Path) -> list[str]:
    """The variants of a component's safetensors files: `fp16` of model.fp16.safetensors, also where
    it is split."""
    names = [file.stem.partition(".")[2] for file in folder.glob("*.safetensors")]
    return sorted({name.partition("-")[0] for name in names if name})


def read_folder_shapes(folder: Path, variant: str | None = None) -> dict[str, list[int]]:
    """Tensor's name -> shape for a component's folder; {} for another format than safetensors, and
    for no files. Raises UserError for a damaged file."""
    shapes: dict[str, list[int]] = {}
    for file in list_weight_files(folder, variant):
        shapes |= read_shapes(file)
    return shapes


def read_shapes(path: Path) -> dict[str, list[int]]:
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


def find_snapshot(
    hub_id: str, file: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path | None:
    """Return the folder of the hub's cache that has this file of a model; None for no such one."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, file, revision=revision, cache_dir=cache_dir)
    return Path(path).parent if isinstance(path, str) else None


def group_quantized(path: Path) -> dict[str, dict[str, str]]:
    """Return {layer: {last part of a tensor's name: its dtype}} of the layers in a safetensors file
    whose weights are quantized; {} for another format."""
    if path.suffix != ".safetensors":
        return {}
    layers: dict[str, dict[str, str]] = {}
    with safe_open(path, "np") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    for name, dtype in dtypes.items():
        layer, _, part = name.rpartition(".")
        if dtype in ("I8", "U8") or QUANTIZED.fullmatch(part):
            layers.setdefault(layer, {})[part] = dtype
            if (weight := f"{layer}.weight") in dtypes:
                layers[layer]["weight"] = dtypes[weight]
    return layers


def is_hub_id(name: str) -> bool:
    """`owner/model-1.0` is one despite its dot; `owner/model.safetensors`, `./model` and what the
    hub would not take as a name are paths."""
    return bool(HUB_NAME_PATTERN.fullmatch(name)) and Path(name).suffix not in SINGLE_FILE_SUFFIXES


def read_unet_resolution(folder: Path) -> int | None:
    """The side in px by the configuration of the UNet, and of the VAE, which may be another's; None
    where it does not say it."""
    try:
        # The UNet's side is in latents.
        latent = int(read_json(folder / "unet" / "config.json")["sample_size"])

        # The VAE says how many px are in one of them.
        vae = folder / "vae" / "config.json"
        levels = DEFAULT_VAE_LEVELS
        if vae.is_file():
            levels = len(read_json(vae)["block_out_channels"])
        return latent * 2 ** (levels - 1) if latent > 0 else None
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None


class OtherModel(NamedTuple):
    """A model that is no base here, though its files resemble those of a family."""

    title: str
    keys: tuple[str, ...] = ()  # its file has all of these,
    lacks: str = ""  # and not this one,
    inputs: int = 0  # and so many columns in `img_in.weight`,
    word: str = ""  # and this in its name, where the tensors are a family's

    def is_named(self, name: str) -> bool:
        """Whether the name of a file or a model says that it is this one."""
        return bool(re.search(self.word, name.lower()))

    def is_match(self, name: str, shapes: Mapping[str, list[int]]) -> bool:
        """Whether a file of this name with these tensors is this one."""
        columns = shapes.get("img_in.weight", [0])[-1]
        has_keys = bool(self.keys) and shapes.keys() >= {*self.keys} and self.lacks not in shapes
        return has_keys and self.inputs in (0, columns) and self.is_named(name)


FLUX1_TENSORS = ("vector_in.in_layer.weight", "double_blocks.0.img_attn.norm.key_norm.scale")
OTHER_MODELS = (
    OtherModel("FLUX.1 Kontext", FLUX1_TENSORS, word="kontext"),
    OtherModel("FLUX.1 Fill", FLUX1_TENSORS, inputs=384),
    OtherModel("FLUX.1 Depth or Canny", FLUX1_TENSORS, inputs=128),
    OtherModel("FLUX.1 schnell", FLUX1_TENSORS, lacks="guidance_in.in_layer.bias"),
    OtherModel(
        "FLUX.2 dev", ("single_stream_modulation.lin.weight", "guidance_in.in_layer.weight")
    ),
    OtherModel("Qwen-Image-Edit", ("txt_norm.weight",), word="qwen.?image.*edit"),
    OtherModel("Chroma", ("distilled_guidance_layer.in_proj.bias",)),
    OtherModel("Wan", ("head.modulation",)),
    OtherModel("HiDream", ("double_stream_blocks.0.block.adaLN_modulation.1.bias",)),
    OtherModel("FLUX.1 in diffusers' layout", ("single_transformer_blocks.0.proj_mlp.weight",)),
    OtherModel("Stable Diffusion 3 in diffusers' layout", ("pos_embed.proj.weight", SD3_TENSOR)),
    OtherModel("a GGUF file", word="gguf"),
)
"""Asked before the marks of the families. Without its files a hub id is told by the word alone."""


def detect_file_facts(path: Path, tensors: Mapping[str, list[int]]) -> family_facts.FamilyFacts:
    """The family of a single file, by the names of its tensors {name: shape}. Raises UserError for
    another model, and for one that no family claims."""
    # Another format than safetensors does not tell its tensors.
    if not tensors:
        return family_facts.SDXL
    shapes = {name.removeprefix(DENOISER_PREFIX): shape for name, shape in tensors.items()}
    if other := next((one for one in OTHER_MODELS if one.is_match(path.stem, shapes)), None):
        raise UserError(f"{path} is {other.title}, which is no base here: {format_file_advice()}.")
    for facts in family_facts.FAMILIES:
        if facts.marker_tensor in shapes:
            return facts
    raise UserError(
        f"{path} holds weights of no family that is known here, but {min(shapes):.80}: "
        f"{format_file_advice()}."
    )


def format_file_advice() -> str:
    titles = ", ".join(facts.title for facts in family_facts.FAMILIES)
    return f"give a file of {titles}, in the layout of its authors"


def detect_hub_facts(name: str) -> family_facts.FamilyFacts | None:
    """The flow family whose name a hub id has; None for another id. Raises UserError for an id that
    says that it is something else."""
    if other := next((one for one in OTHER_MODELS if one.word and one.is_named(name)), None):
        raise UserError(f"{name} is {other.title} by its name, which is no base here.")
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    flows = [facts for facts in family_facts.FAMILIES if facts.style == "flow"]
    named = (one for one in flows if re.sub(r"[^a-z0-9]", "", one.title.lower()) in letters)
    return next(named, None)


def check_is_dense(folder: Path) -> None:
    """Raises UserError for a part of a base whose weights are quantised already."""
    config = folder / "config.json"
    if config.is_file() and (found := read_json(config).get("quantization_config")):
        how = found.get("quant_method", "") if isinstance(found, dict) else found
        raise UserError(
            f"{folder} is quantised already ({how!s:.40}): give the base in full or half "
            "precision, which --base_quantization quantises."
        )


def get_index_facts(index: dict) -> family_facts.FamilyFacts:
    """The family of a base by its `model_index.json`. Raises UserError for one that cannot be
    trained."""
    name = str(index.get("_class_name", ""))

    # SDXL has pipelines for other tasks, such as inpainting, whose parts are the same.
    if not name or name.startswith("StableDiffusionXL"):
        name = "StableDiffusionXLPipeline"
    return family_facts.get_facts(name)


def check_weights(folder: Path, variant: str | None = None) -> None:
    """Raises UserError for a part of a base without weights."""
    if not list_weight_files(folder, variant):
        lack = "there is neither a .safetensors nor a .bin file in it"
        raise UserError(f"{folder} has no weights: {lack}.")


def find_configs(checkpoint: Path) -> Path | None:
    """The folder of the same stem beside a single-file checkpoint, if it holds a diffusers model's
    configs."""
    folder = checkpoint.with_suffix("")
    return folder if (folder / INDEX_NAME).is_file() else None
