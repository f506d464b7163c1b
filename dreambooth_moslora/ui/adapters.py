"""The adapters that a visitor can choose or upload: files in known folders, by name. A visitor's path is never opened.

The size and the header of an uploaded file bound its cost before anything is loaded or computed.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dreambooth_moslora.core import UserError, assets_folder, free_name
from dreambooth_moslora.disk.queue import COMMAND_LINE
from dreambooth_moslora.disk.run_folder import NONE, clean_name, files_by_name, run_files
from dreambooth_moslora.ui.guard import MAX_UPLOAD_BYTES
from dreambooth_moslora.ui.jobs import JOB_NAME, Job
from dreambooth_moslora.ui.visitors import Visitor

MAX_HEADER_BYTES = 8 * 1024**2
"""SDXL with all layers trained needs less than 1 MiB; large data sets add long lists of tags."""
MAX_QUOTES = 400_000
"""Quotes in a header: four for each entry of its metadata, ten for each tensor."""
MAX_WORK = 2e10
"""Sum of rank²·width over all matrices: about half a minute of one core. Rank 64 on all of SDXL is 0.8e10."""


def check_upload(source: Path) -> None:
    """Raises UserError for anything but a safetensors file of reasonable size and header."""
    if source.suffix != ".safetensors":
        raise UserError(f"{source.name} is not a .safetensors file; other formats can carry code and are not opened")
    if (size := source.stat().st_size) > MAX_UPLOAD_BYTES:
        raise UserError(f"{source.name} has {size / 2**20:.0f} MiB; at most {MAX_UPLOAD_BYTES // 2**20} are taken")
    if _work(check_header(source)) > MAX_WORK:
        raise UserError(f"{source.name}: its ranks are too high; measuring them would hold up everybody else")


def check_header(file: Path) -> bytes:
    """The header's JSON, unparsed. Raises UserError for one that takes long to parse, and OSError."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if MAX_HEADER_BYTES < length <= file.stat().st_size:
            raise UserError(f"{file.name}: its header has {length / 2**20:.0f} MiB; at most 8 are read")
        header = opened.read(min(length, MAX_HEADER_BYTES))
    if header.count(b'"') - header.count(b'\\"') > MAX_QUOTES:
        raise UserError(f"{file.name}: its header holds too many names")
    return header


def _work(header: bytes) -> float:
    """The cost of measuring the file's ranks; 0 for an unreadable header, which fails later with a reason."""
    try:
        facts = json.loads(header)
        return sum(_work_of(entry["shape"]) for key, entry in facts.items() if "lora" in key and key != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0.0


def _work_of(shape: Any) -> float:
    low, high = sorted((shape[0], prod(shape[1:]))) if len(shape) > 1 else (0, 0)
    return float(low) ** 2 * high


PROJECT = assets_folder().parent
MAX_UPLOADS = 16


@dataclass(frozen=True)
class AdapterCatalog:
    """Finds adapters in `adapters_dir` (safetensors files) and `runs_dir` (finished runs and their checkpoints)."""

    adapters_dir: Path
    runs_dir: Path

    def files(self, visitor: Visitor | None = None) -> dict[str, Path]:
        """Name -> file. The visitor's own uploads come first; a checkpoint is called `run@step`.

        Runs that a visitor started are listed for that visitor only; runs of the command line are listed for
        all.
        """
        uploads = dict(visitor.uploads) if visitor else {}
        runs = [folder for folder in self.runs_dir.glob("*/") if _may_see(folder, visitor)]
        files = [*sorted(self.adapters_dir.glob("*.safetensors")), *run_files(runs)]
        return uploads | files_by_name(files, (self.adapters_dir, self.runs_dir), taken=uploads)

    def path(self, name: str, visitor: Visitor | None = None) -> Path:
        """The file of that name. Raises UserError for an unlisted name: names are looked up, never joined to a
        folder."""
        files = self.files(visitor)
        if name not in files:
            raise UserError(f"there is no adapter {name!s:.60}; choose one of: {', '.join(files) or 'none is there'}")
        return files[name]

    def public_paths(self, visitor: Visitor | None = None) -> dict[str, str]:
        """Name -> the path to write in a program, relative to the project: no folder of this machine is shown."""
        return {name: _public_path(file, self.runs_dir) for name, file in self.files(visitor).items()}

    def name_of(self, file: Path, visitor: Visitor | None = None) -> str:
        """The name under which `file` is listed. Raises UserError when it is not."""
        for name, path in self.files(visitor).items():
            if path == file:
                return name
        raise UserError("there is no adapter yet")

    def add_upload(self, uploaded: str | Path, visitor: Visitor) -> str:
        """Keep an uploaded file for its visitor alone; returns its name. The pipeline has checked its content.
        Raises UserError."""
        source = Path(uploaded)
        check_upload(source)
        if len(visitor.uploads) >= MAX_UPLOADS:
            raise UserError(f"{MAX_UPLOADS} adapters are uploaded already; reload the page later or use the folder")
        name = free_name(clean_name(source.stem), {NONE, *self.files(visitor)}.__contains__, " ")
        target = Path(tempfile.mkdtemp(prefix="adapter-", dir=visitor.folder)) / f"{name}.safetensors"
        shutil.copyfile(source, target)
        visitor.uploads[name] = target
        return name


def _may_see(run_dir: Path, visitor: Visitor | None) -> bool:
    """Whether the visitor may see the run. A run without `job.json`, or without an owner, is of the command
    line; a run with an unreadable owner is hidden from all."""
    if not is_of_a_visitor(run_dir):
        return True
    job = Job.load(run_dir)
    return job is not None and (job.owner == COMMAND_LINE or (visitor is not None and job.owner == visitor.id))


def is_of_a_visitor(run_dir: Path) -> bool:
    """Whether there is a `job.json`; an error counts as yes."""
    try:
        (run_dir / JOB_NAME).lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _public_path(file: Path, runs_dir: Path) -> str:
    """`runs/dog`, `runs/dog/checkpoint-500` or `assets/adapters/dog.safetensors`; elsewhere the bare name."""
    is_run = file.is_relative_to(runs_dir)
    wanted = file.parent if is_run else file
    if wanted.is_relative_to(PROJECT):
        return wanted.relative_to(PROJECT).as_posix()
    return f"runs/{wanted.relative_to(runs_dir).as_posix()}" if is_run else file.name
