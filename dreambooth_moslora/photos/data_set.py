"""`--dataset_name`: the images of a data set, on the hub or local, become a folder of photos.

Their files are written unchanged.
"""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.atomic import atomic_directory
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.photos.beside import CAPTION_SUFFIX, METADATA, one_space
from dreambooth_moslora.settings.table import TrainConfig


def dataset_folder(config: TrainConfig) -> Path:
    """The folder with the data set's images; its name is a digest of their content. Raises
    UserError."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    table = load_images(config)

    # All folders that may hold its files: a row may name no file outside of them.
    places = [
        config.cache_folder,
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        HF_HUB_CACHE,
    ]
    if Path(config.dataset_name).is_dir():
        places.append(config.dataset_name)
    own = [Path(place).resolve() for place in places]

    # Collect images and captions, and the digest that names the folder.
    rows = []
    digest = sha256()
    for row in table:
        content = image_bytes(row[config.image_column], own)
        captions = []
        if config.caption_column:
            captions = captions_in(row[config.caption_column], config.caption_column)
        if content:
            rows.append((content, captions))
            digest.update(sha256(content).digest() + "\0".join(captions).encode())

    # The same data set is written once; another revision gets another folder.
    folder = config.cache_folder / "photos" / digest.hexdigest()[:16]
    if not folder.is_dir():
        with atomic_directory(folder) as new:
            write_rows(new, rows)
    return folder


def load_images(config: TrainConfig) -> Iterable[dict[str, Any]]:
    """The rows of the train split, with images left encoded. Raises UserError."""
    import datasets

    name = config.dataset_name
    try:
        table = datasets.load_dataset(
            name, config.dataset_config_name, cache_dir=config.cache_dir, split="train"
        )
    except Exception as error:  # raised by the library, the hub or the file formats
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--dataset_name {name}: cannot be loaded: {reason}") from error

    # Both columns must be there, and one must hold images.
    for flag in ("image_column", "caption_column"):
        wanted = getattr(config, flag)
        if wanted is not None and wanted not in table.column_names:
            columns = ", ".join(table.column_names)
            raise UserError(f"--{flag} {wanted}: the data set has the columns {columns}.")
    column = config.image_column
    if not isinstance(table.features[column], datasets.Image):
        raise UserError(f"--image_column {column}: that column of {name} holds no images.")

    # The files' bytes, not decoded pixels: the folder gets them unchanged.
    return table.cast_column(column, datasets.Image(decode=False))


def captions_in(cell: Any, column: str) -> list[str]:
    """The captions in a cell of the column: a text, or a list of texts. Raises UserError for
    anything else."""
    texts = cell if isinstance(cell, list) else [cell]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise UserError(
            f"--caption_column {column}: it holds neither texts nor lists of texts; name another."
        )
    return list(filter(None, texts))


def image_bytes(cell: dict[str, Any] | None, own: list[Path]) -> bytes:
    """The image's file, empty for an empty cell. Raises UserError for a file outside of the folders
    `own`."""
    cell = cell or {}
    content = cell.get("bytes") or b""
    named = cell.get("path") or ""
    if content or not named:
        return content

    # Anyone may have written the table: it could name a private file of this machine.
    path = Path(named).resolve()
    is_own = any(path.is_relative_to(folder) for folder in own)
    if not (path.is_file() and is_own):
        raise UserError(
            f"--dataset_name: it names {one_line(named)}, which is not a file of the data set."
        )
    return path.read_bytes()


def write_rows(folder: Path, rows: list[tuple[bytes, list[str]]]) -> None:
    """Write images, one caption each into METADATA, and several into a text file beside the image.
    Images are read whatever their suffix."""
    lines = []
    for number, (content, captions) in enumerate(rows):
        path = folder / f"{number:05d}.jpg"
        path.write_bytes(content)
        if len(captions) > 1:
            text = "\n".join(map(one_space, captions))
            path.with_suffix(CAPTION_SUFFIX).write_text(text, encoding="utf-8")
        elif captions:
            row = {"file_name": path.name, "text": captions[0]}
            lines.append(json.dumps(row, ensure_ascii=False))
    if lines:
        (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
