"""Results of a study's cells on the disk; the file name has a digest of everything that the result depends on."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from dreambooth_moslora.base.locate import resolve_base
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.evaluation.encoders import TOY_DINO, own_encoders
from dreambooth_moslora.evaluation.studies.stats import Result
from dreambooth_moslora.evaluation.studies.study import Cell, Study

__all__ = ["content_of", "read_results", "result_path"]

WHOLE_BYTES, END_BYTES = 64 << 20, 1 << 20


def result_path(study: Study, cell: Cell, out: Path) -> Path:
    digest = study.digest(cell, [content_of(path) for path in materials(study, cell.subject)])
    return out / "cells" / f"{cell.name}-{digest}.json"


def materials(study: Study, subject: str) -> list[Path]:
    """The local files that a result depends on: photos, base and encoders. Hub models are identified by name."""
    base, protocol = resolve_base(study.base), study.protocol
    beside = [base.parent / TOY_DINO] if own_encoders(study.base) else []
    mine = study.subject(subject)
    found = [base, mine.photos, *(one.photos for one in mine.beside), protocol.clip, protocol.dino, *beside]
    return [Path(path) for path in found if path and Path(path).exists()]


@lru_cache(maxsize=64)
def content_of(path: Path) -> str:
    """A digest of a file, or of all files below a folder except .md files."""
    files = [path]
    if not path.is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".md")
    return content_key(files=[(str(file.relative_to(path)), file_mark(file)) for file in files])


def file_mark(path: Path) -> str:
    """The digest of a file. For a large file only its size and last bytes count, which any training changes."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return file_digest(path)
    with path.open("rb") as file:
        file.seek(-END_BYTES, os.SEEK_END)
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}"


def read_results(study: Study, cells: Iterable[Cell], out: Path) -> list[Result]:
    """The results of those cells that are finished."""
    paths = [result_path(study, cell, out) for cell in cells]
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return [Result(Cell(**s["cell"]), s["scores"], s["pictures"], s["cost"]) for s in stored]
