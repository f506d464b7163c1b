"""A base's files on this machine, and what their headers say without loading the model.

`--dry_run` and training run the same checks: a base that passes the first is not refused by the second.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dreambooth_moslora.core import TOY_PX, TOYS, UserError, assets_folder, is_toy, user_path
from dreambooth_moslora.settings import families, table

LFS_POINTER = b"version https://git-lfs.github.com/spec"
USUAL_VAE_LEVELS = 4  # each but the last halves the side
SMALL_BASE_PX = 256  # A base of at most this resolution needs no care with GPU memory
TOY = assets_folder() / "toy-sdxl"
HUB_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
SINGLE_FILE_SUFFIXES = {".safetensors", ".ckpt"}
DENOISER_PREFIX = "model.diffusion_model."  # of the denoiser's tensors in a whole checkpoint
INDEX = "model_index.json"
TEXT_MARKS = {"text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"}
LOGIN = "asks for a login: accept its terms on its page, then `hf auth login`"
HUB_ANSWERS = {401: LOGIN, 403: LOGIN, 404: "has no such model"}
MARKS = {"unet": {"conv_in.weight"}, "vae": {"encoder.conv_in.weight"}}
MARKS |= dict.fromkeys(("text_encoder", "text_encoder_2"), TEXT_MARKS)
"""Component with weights -> names of a tensor that each such component has."""


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a base's component that are loaded: the variant's, if there are any."""
    for suffix in (".safetensors", ".bin"):
        if files := sorted(folder.glob(f"*{suffix}")):
            chosen = [file for file in files if variant and f".{variant}" in file.name]
            return chosen or [file for file in files if "." not in file.stem] or files
    return []


def variants_in(folder: Path) -> list[str]:
    """The variants of a component's safetensors files: `fp16` of model.fp16.safetensors, also where it is split."""
    names = [file.stem.partition(".")[2] for file in folder.glob("*.safetensors")]
    return sorted({name.partition("-")[0] for name in names if name})


def variant_here(name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> str | None:
    """The variant of a base whose plain files are not on this machine, `fp16` before others; else None. A training by
    `sdxl.toml` fetches that variant alone. Raises UserError."""
    source = resolve_base(name)
    folder = cached_folder(source, revision, cache_dir) if isinstance(source, str) else source
    for denoiser in families.DENOISERS if folder else ():
        if any("." in file.stem for file in weight_files(folder / denoiser)):
            return min(variants_in(folder / denoiser), key=lambda variant: (variant != "fp16", variant), default=None)
    return None


def tensor_shapes(folder: Path, variant: str | None = None) -> dict[str, list[int]]:
    """Name -> shape for a component's folder; empty for another format, or none. Raises UserError."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder, variant):
        shapes |= shapes_in(file)
    return shapes


def shapes_in(path: Path) -> dict[str, list[int]]:
    """{tensor's name: its shape} of a safetensors file; {} for another format. Raises UserError for a damaged one."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a git-lfs pointer, the weights are not here: fetch them with `git lfs pull`.")
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged, cut short or not a safetensors file ({error}): fetch it again.") from None


def resolve_base(name: str | Path) -> str | Path:
    """A toy's name, a folder, a single file, or a hub id (unchanged). Raises UserError for one missing or damaged."""
    if str(name) in TOYS:
        toy = assets_folder() / TOYS[str(name)]
        if not (toy / INDEX).is_file():
            raise UserError(f"the embedded base is missing: {toy} has no {INDEX}; clone or install it again.")
        return toy
    path = user_path(name)
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise UserError(f"{path} is not a diffusers model: it has no {INDEX}.")
        return path
    if path.is_file():
        if path.suffix not in SINGLE_FILE_SUFFIXES:
            raise UserError(f"{path} is neither a diffusers folder nor a .safetensors checkpoint.")
        shapes_in(path)
        return path
    if not is_hub_id(str(name)):
        raise UserError(f"the base {name} does not exist: give a diffusers folder, a .safetensors file or a hub id.")
    return str(name)


def is_hub_id(name: str) -> bool:
    """`owner/model-1.0` is one despite its dot; `owner/model.safetensors`, `./model` and what the hub would not take as
    a name are paths."""
    return bool(HUB_NAME.fullmatch(name)) and Path(name).suffix not in SINGLE_FILE_SUFFIXES


def base_folder(config: table.TrainConfig) -> Path | None:
    """The diffusers folder of the base; None for a single file or one not fetched yet. Raises UserError."""
    source = resolve_base(config.pretrained_model_name_or_path)
    if isinstance(source, str):
        folder = cached_folder(source, config.revision, config.cache_dir)
        has_denoiser = folder and any((folder / name / "config.json").is_file() for name in families.DENOISERS)
        return folder if has_denoiser else None
    if source.is_file():
        return None
    check_diffusers_folder(source, config.variant, has_vae=config.pretrained_vae_model_name_or_path is None)
    return source


def check_diffusers_folder(folder: Path, variant: str | None = None, *, has_vae: bool = True) -> None:
    """Raises UserError for a folder that is no complete base. With `has_vae` False it may lack a VAE."""
    index = read_json(folder / INDEX)
    facts = facts_in(index)
    models = [part for part in (facts.denoiser, "vae", *facts.encoders) if has_vae or part != "vae"]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in facts.encoders]
    for part in (*models, *tokenizers, "scheduler"):
        if not isinstance(index.get(part), list) or None in index[part]:
            title = f"{facts.article} {facts.title}"
            raise UserError(f"{folder} is not {title} base model: its {INDEX} names no {part}.")
        if not any((folder / part).glob("*.json")):
            raise UserError(f"{folder} is not a whole base model: {folder / part} is missing or has no configuration.")
    if facts.needs_sizes and read_json(folder / "unet" / "config.json").get("addition_embed_type") != "text_time":
        raise UserError(f"{folder} is not an SDXL base model: its UNet has no size conditioning (text_time).")
    for part in models:
        marks = MARKS.get(part) if facts.denoiser == "unet" else None
        check_component(folder / part, variant, tensor_shapes(folder / part, variant), marks)


def facts_of_base(
    name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None
) -> families.Facts | None:
    """The family of a base; None for a hub id that is not known and cannot be asked for. Raises UserError."""
    source = resolve_base(name)
    if isinstance(source, Path) and source.is_file():
        return facts_of_file(source)
    known = families.BY_HUB_ID.get(source.lower()) if isinstance(source, str) else None
    if known and not cached_folder(source, revision, cache_dir):
        return known[0]
    index = index_of(name, revision, cache_dir)
    return None if index is None else facts_in(index)


def index_of(name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> dict | None:
    """A base's `model_index.json`; None for a single file, and a hub id that cannot be asked for. Raises UserError."""
    source = resolve_base(name)
    if isinstance(source, Path):
        return read_json(source / INDEX) if source.is_dir() else None
    index = hub_index(source, revision, cache_dir)
    return index if isinstance(index, dict) else None


def cached_folder(source: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path | None:
    """Where the hub's cache has the base of that id."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, INDEX, revision=revision, cache_dir=cache_dir)
    return Path(found).parent if isinstance(found, str) else None


@cache
def hub_index(source: str, revision: str | None = None, cache_dir: str | Path | None = None) -> dict | str:
    """The `model_index.json` of a hub id, from the cache or the hub; a reason where neither gives one. The hub is asked
    once, for five seconds: loading a base asks it again for minutes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import OfflineModeIsEnabled, build_hf_headers, get_session

    if folder := cached_folder(source, revision, cache_dir):
        return read_json(folder / INDEX)
    try:
        answer = get_session().get(hf_hub_url(source, INDEX, revision=revision), headers=build_hf_headers(), timeout=5)
        index = answer.json() if answer.status_code == 200 else HUB_ANSWERS.get(answer.status_code, "has none")
    except OfflineModeIsEnabled:
        return "is not asked, as HF_HUB_OFFLINE is set"
    except Exception:  # the client passes on the HTTP library's errors
        return "does not answer"
    return index if isinstance(index, (dict, str)) else "has none"


def require_reachable(config: table.TrainConfig) -> None:
    """Raises UserError for a base of the hub that is not in the cache, where the hub does not give it either."""
    source = resolve_base(config.pretrained_model_name_or_path)
    index = hub_index(source, config.revision, config.cache_dir) if isinstance(source, str) else None
    if isinstance(index, str):
        raise UserError(
            f"the base {source} is not on this machine, and the hub {index}: give the folder of a base, or fetch "
            f"it with `hf download {source}` where there is a connection."
        )


def own_resolution(name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> int:
    """The side in px that the base was trained at, by its files: `load.default_resolution` before it is loaded. The
    usual one for a base that is not known yet, and for one that cannot be used, which is refused later."""
    if is_toy(str(name)):
        return TOY_PX
    with suppress(UserError):
        facts, source = facts_of_base(name, revision, cache_dir), resolve_base(name)
        folder = source if isinstance(source, Path) else cached_folder(source, revision, cache_dir)
        if folder and folder.is_file():
            folder = configs_beside(folder)
        if side := (unet_side(folder) if folder else None) or (facts and facts.resolution_px):
            return side
    return table.TrainConfig.resolution


def unet_side(folder: Path) -> int | None:
    """The side in px by the configuration of the UNet, and of the VAE, which may be another's; None where it does not
    say it."""
    try:
        latent = int(read_json(folder / "unet" / "config.json")["sample_size"])
        vae = folder / "vae" / "config.json"
        levels = len(read_json(vae)["block_out_channels"]) if vae.is_file() else USUAL_VAE_LEVELS
        return latent * 2 ** (levels - 1) if latent > 0 else None
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None


def facts_of_file(path: Path) -> families.Facts:
    """The family of a single file: that of the configs beside it, else by the names of its tensors."""
    if configs := configs_beside(path):
        return facts_in(read_json(configs / INDEX))
    return facts_by_names(shapes_in(path))


def facts_by_names(tensors: Iterable[str]) -> families.Facts:
    """The family of a single file, by the names of its tensors."""
    names = {name.removeprefix(DENOISER_PREFIX) for name in tensors}
    found = (facts for facts in families.FAMILIES if facts.file_mark in names)
    return next(found, families.facts_of("StableDiffusionXLPipeline"))


def facts_in(index: dict) -> families.Facts:
    """The family of a base by its `model_index.json`. Raises UserError for one that cannot be trained."""
    name = str(index.get("_class_name", ""))
    return families.facts_of("StableDiffusionXLPipeline" if name.startswith("StableDiffusionXL") or not name else name)


def check_vae(name: str) -> None:
    """Raises UserError for a VAE folder that is missing or incomplete. A VAE on the hub is not checked."""
    path = Path(name)
    if path.is_dir():
        read_json(path / "config.json")
        check_component(path, None, tensor_shapes(path), MARKS["vae"])
    elif path.exists() or not is_hub_id(name):
        raise UserError(f"the VAE {name} is neither a diffusers folder that is here nor a hub id.")


def check_component(folder: Path, variant: str | None, shapes: Mapping[str, list[int]], marks: set[str] | None) -> None:
    """Raises UserError for a folder without weights, and for another model's weights: their `shapes`,
    by tensor's name, have none of `marks`."""
    if not weight_files(folder, variant):
        lack = "there is neither a .safetensors nor a .bin file in it"
        raise UserError(f"{folder} has no weights: {lack}.")
    if marks and shapes and not shapes.keys() & marks:
        other = f"it has no {min(marks)}, but {min(shapes):.80}"
        raise UserError(f"{folder} holds weights of another model: {other}.")


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
    """The folder of the same stem beside a single-file checkpoint, if it holds a diffusers model's configs."""
    folder = checkpoint.with_suffix("")
    return folder if (folder / INDEX).is_file() else None
