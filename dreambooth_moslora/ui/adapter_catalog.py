"""The adapters that can be chosen: files in known folders by name, never a path that somebody typed."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.core.assets import assets_folder
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import free_name
from dreambooth_moslora.core.run_folder import PUBLISHED_NAME, RAW_NAME, TOKENS_SUFFIX, RunDir
from dreambooth_moslora.training.run_queue import COMMAND_LINE
from dreambooth_moslora.ui.adapter_check import check_upload
from dreambooth_moslora.ui.generate_form import NONE
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.training.jobs import JOB_NAME, Job

__all__ = ["AdapterCatalog"]

PROJECT = assets_folder().parent
MAX_UPLOADS = 16
UNSAFE = re.compile(r"[^\w .+-]+")


@dataclass(frozen=True)
class AdapterCatalog:
    """Finds adapters in `adapters_dir` (safetensors files) and `runs_dir` (finished runs and their checkpoints)."""

    adapters_dir: Path
    runs_dir: Path

    def files(self, visitor: Visitor | None = None) -> dict[str, Path]:
        """Name -> file. The visitor's own uploads come first; a checkpoint is called `run@step`.

        Runs that a visitor started are on that visitor's shelf alone; runs of the command line are on everybody's.
        """
        found = dict(visitor.uploads) if visitor else {}
        runs = [folder for folder in self.runs_dir.glob("*/") if _may_see(folder, visitor)]
        for file in [*sorted(self.adapters_dir.glob("*.safetensors")), *_run_files(runs)]:
            if file.name.endswith(TOKENS_SUFFIX):  # it belongs to an adapter
                continue
            if not _is_file_inside(file, (self.adapters_dir, self.runs_dir)):
                continue
            found[free_name(_name_of(file, self.runs_dir), {NONE, *found}.__contains__, " ")] = file
        return found

    def path(self, name: str, visitor: Visitor | None = None) -> Path:
        """Raises UserError for a name that is not on the shelf: names are looked up, never joined to a folder."""
        files = self.files(visitor)
        if name not in files:
            raise UserError(f"there is no adapter {name!s:.60}; choose one of: {', '.join(files) or 'none is there'}")
        return files[name]

    def public_paths(self, visitor: Visitor | None = None) -> dict[str, str]:
        """Name -> what to write for the file in a program, relative to the project: no folder of this machine."""
        return {name: _public_path(file, self.runs_dir) for name, file in self.files(visitor).items()}

    def name_of(self, file: Path, visitor: Visitor | None = None) -> str:
        """The name under which `file` is on the shelf. Raises UserError when it is not."""
        for name, path in self.files(visitor).items():
            if path == file:
                return name
        raise UserError("there is no adapter yet")

    def add_upload(self, uploaded: str | Path, visitor: Visitor) -> str:
        """Keep an uploaded file for its visitor alone; returns its name. The pipeline has checked its content."""
        source = Path(uploaded)
        check_upload(source)
        if len(visitor.uploads) >= MAX_UPLOADS:
            raise UserError(f"{MAX_UPLOADS} adapters are uploaded already; reload the page later or use the folder")
        name = free_name(clean_name(source.stem), {NONE, *self.files(visitor)}.__contains__, " ")
        target = Path(tempfile.mkdtemp(prefix="adapter-", dir=visitor.folder)) / f"{name}.safetensors"
        shutil.copyfile(source, target)
        visitor.uploads[name] = target
        return name


def clean_name(text: str) -> str:
    """What may be shown, put in a tag and used as a file name: letters, digits, space and `.+-_`."""
    return UNSAFE.sub("_", text).strip(" ._")[:60] or "adapter"


def _may_see(run_dir: Path, visitor: Visitor | None) -> bool:
    """A run without `job.json`, or without an owner, is of the command line; one whose owner cannot be read is nobody's
    to see.
    """
    if not is_of_a_visitor(run_dir):
        return True
    job = Job.load(run_dir)
    return job is not None and (job.owner == COMMAND_LINE or (visitor is not None and job.owner == visitor.id))


def is_of_a_visitor(run_dir: Path) -> bool:
    """Whether there is a `job.json`; when that cannot be told, it counts as there."""
    try:
        (run_dir / JOB_NAME).lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _run_files(runs: list[Path]) -> list[Path]:
    """Newest run first, each beside its best step, then checkpoints, each run's from the last to the first."""
    places = [place for run in runs for place in (RunDir(run).adapter_path, RunDir(run).best_dir / PUBLISHED_NAME)]
    finished = [file for file in places if file.is_file()]
    checkpoints = [file for run in runs for file in run.glob(f"checkpoint-*/{RAW_NAME}")]
    newest = {run: RunDir(run).adapter_path.stat().st_mtime for run in runs if RunDir(run).adapter_path.is_file()}
    finished.sort(key=lambda file: -max(newest.get(run, 0.0) for run in (file.parent, file.parent.parent)))
    return [*finished, *sorted(checkpoints, key=_checkpoint_order)]


def _checkpoint_order(file: Path) -> tuple[str, int]:
    return file.parent.parent.name, -_step_of(file.parent)


def _step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else 0


def _name_of(file: Path, runs_dir: Path) -> str:
    """`dog`, `dog@500` for a checkpoint, `dog@best` for the best step of a run."""
    if file.name == RAW_NAME:
        return f"{clean_name(file.parent.parent.name)}@{_step_of(file.parent)}"
    if file.name != PUBLISHED_NAME:
        return clean_name(file.stem)
    is_best = file.parent.name == "best" and file.parent.parent != runs_dir
    return f"{clean_name(file.parent.parent.name)}@best" if is_best else clean_name(file.parent.name)


def _public_path(file: Path, runs_dir: Path) -> str:
    """`runs/dog`, `runs/dog/checkpoint-500` or `assets/adapters/dog.safetensors`; elsewhere the bare name."""
    is_run = file.is_relative_to(runs_dir)
    wanted = file.parent if is_run else file
    if wanted.is_relative_to(PROJECT):
        return wanted.relative_to(PROJECT).as_posix()
    return f"runs/{wanted.relative_to(runs_dir).as_posix()}" if is_run else file.name


def _is_file_inside(file: Path, folders: tuple[Path, ...]) -> bool:
    """Also after following links: a link out of the folders, or in a circle, is not on the shelf, nor is a pipe."""
    try:
        place = file.resolve(strict=True)
        return place.is_file() and any(place.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, RuntimeError):
        return False
