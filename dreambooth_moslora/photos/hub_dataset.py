"""`--dataset_name`: the images of a data set, on the hub or local, as a folder of photos.

The image files are written unchanged, with their captions in `metadata.jsonl`, so that EXIF, transparency and
the encoding cache work as for any folder.
"""

import json
from collections.abc import Iterable
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.atomic_files import atomic_directory
from dreambooth_moslora.core.config.fields import nearest
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.photos.sidecars import METADATA

__all__ = ["dataset_folder"]


def dataset_folder(config: TrainConfig) -> Path:
    """The folder with the data set's images; its name is a digest of their content. Raises UserError."""
    table = load_images(config)
    own = own_folders(config)
    rows = [(image_bytes(row[config.image_column], own), caption_of(row, config.caption_column)) for row in table]
    rows = [(content, caption) for content, caption in rows if content]
    digest = sha256(b"".join(sha256(content).digest() + (caption or "").encode() for content, caption in rows))
    folder = cache_root(config) / "photos" / digest.hexdigest()[:16]
    if not folder.is_dir():
        with atomic_directory(folder) as new:
            write_rows(new, rows)
    return folder


def cache_root(config: TrainConfig) -> Path:
    from dreambooth_moslora.core.digests import default_cache_dir

    return Path(config.cache_dir) if config.cache_dir else default_cache_dir()


def load_images(config: TrainConfig) -> Iterable[dict[str, Any]]:
    """The rows of the train split, with images left encoded. Raises UserError."""
    import datasets

    name, column = config.dataset_name, config.image_column
    try:
        table = datasets.load_dataset(name, config.dataset_config_name, cache_dir=config.cache_dir, split="train")
    except Exception as error:  # raised by the library, the hub or the file formats
        raise UserError(f"--dataset_name {name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    for flag, wanted in (("image_column", column), ("caption_column", config.caption_column)):
        if wanted is not None and wanted not in table.column_names:
            close = nearest(wanted, table.column_names)
            hint = f" Did you mean {close}?" if close else ""
            raise UserError(f"--{flag} {wanted}: the data set has the columns {', '.join(table.column_names)}.{hint}")
    if not isinstance(table.features[column], datasets.Image):
        raise UserError(f"--image_column {column}: that column of {name} holds no images.")
    return table.cast_column(column, datasets.Image(decode=False))


def own_folders(config: TrainConfig) -> list[Path]:
    """Folders that may hold files of the data set: its own, if local, and the library's downloads."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = [config.cache_dir or datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    local = [config.dataset_name] if Path(config.dataset_name).is_dir() else []
    return [Path(folder).resolve() for folder in (*local, *caches, HF_HUB_CACHE)]


def image_bytes(cell: dict[str, Any] | None, own: list[Path]) -> bytes:
    """The image's file; empty for an empty cell. Raises UserError for a path outside the folders `own`.

    A table from the internet might otherwise name any file of this machine.
    """
    if not cell:
        return b""
    if cell.get("bytes"):
        return cell["bytes"]
    path = Path(cell["path"]).resolve()
    if not any(path.is_relative_to(folder) for folder in own):
        raise UserError(f"--dataset_name: it names {one_line(cell['path'])}, which is not a file of the data set.")
    return path.read_bytes()


def caption_of(row: dict[str, Any], column: str | None) -> str | None:
    return str(row[column]) if column is not None and row[column] is not None else None


def write_rows(folder: Path, rows: list[tuple[bytes, str | None]]) -> None:
    lines = []
    for number, (content, caption) in enumerate(rows):
        name = f"{number:05d}{suffix_of(content)}"
        (folder / name).write_bytes(content)
        if caption:
            lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False))
    if lines:
        (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")


def suffix_of(content: bytes) -> str:
    from PIL import Image

    try:
        with Image.open(BytesIO(content)) as image:
            return {"JPEG": ".jpg", "MPO": ".jpg"}.get(image.format or "", f".{(image.format or 'img').lower()}")
    except Exception:  # the reader of the folder reports it
        return ".img"
