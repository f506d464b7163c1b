"""Where the files of a base lie on this machine, if they do, without loading or fetching anything."""

from pathlib import Path

from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.errors import UserError

__all__ = ["base_folder", "configs_beside"]

TOY = Path(__file__).resolve().parents[1] / "assets" / "toy-sdxl"


def base_folder(config: TrainConfig) -> Path | None:
    """The diffusers folder of the base: as named, embedded, or in the hub's cache. None for a single file or none yet.

    Raises UserError for a path that is not there.
    """
    name = config.pretrained_model_name_or_path
    path = TOY if name == "toy" else Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return None
    if name == "toy" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"the base {name} does not exist: give a diffusers folder, a .safetensors file or a hub id.")
    return cached_folder(name, config)


def cached_folder(name: str, config: TrainConfig) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "unet/config.json", cache_dir=config.cache_dir, revision=config.revision)
    return Path(found).parents[1] if isinstance(found, str) else None


def configs_beside(checkpoint: Path) -> Path | None:
    """The folder of the same stem beside a single-file checkpoint, if it holds a diffusers model's configs."""
    folder = checkpoint.with_suffix("")
    return folder if (folder / "model_index.json").is_file() else None
