"""State that all tabs share: the pipeline, adapters, runs, and stops.

The pipeline loads while the page is already up. Adapters are looked up by name: a path that a
request names is never opened.
"""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.library_notes import disable_library_notes
from dreambooth_moslora.base.model_files import MAX_SMALL_BASE_PX
from dreambooth_moslora.disk import processes, run_folder
from dreambooth_moslora.disk.paths import find_free_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.settings.family_facts import SDXL
from dreambooth_moslora.ui import jobs
from dreambooth_moslora.ui.workspace import Workspace

if TYPE_CHECKING:
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

POLL_SEC = 0.5
"""Seconds between two updates of the time that a base has been loading."""
MAX_STOPS = 1000
"""Sessions whose stop is stored at most: a request may name any session."""
MAX_SESSION_CHARACTERS = 32
"""Characters of a session's name that count."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterCatalog:
    """Catalog of adapters among the uploads, in a folder of files, and in the runs."""

    adapters_dir: Path
    """Folder of safetensors files."""
    runs_dir: Path | None
    """Folder of finished runs and their checkpoints; None for a public page."""
    workspace: Workspace
    """Workspace with the uploads."""

    def list_files(self) -> dict[str, Path]:
        """Map names to files; a checkpoint's name is `run@step`."""
        uploads = dict(self.workspace.uploads)
        files = sorted(self.adapters_dir.glob("*.safetensors"))
        places = [self.adapters_dir]
        if self.runs_dir is not None:
            files += run_folder.list_run_adapters(list(self.runs_dir.glob("*/")))
            places.append(self.runs_dir)
        return uploads | run_folder.map_adapter_names(files, places, reserved_names=uploads)

    def find_file(self, name: str) -> Path:
        """Look the file up by its name, which is never joined to a folder.

        Raises UserError for an unlisted name.
        """
        files = self.list_files()
        if name not in files:
            known_names = ", ".join(files) or "none is there"
            raise UserError(f"there is no adapter {name!s:.60}; choose one of: {known_names}")
        return files[name]

    def add_upload(self, uploaded: str | Path) -> str:
        """Store an uploaded file while the page is up; return its name. Raises UserError."""
        source = Path(uploaded)
        if source.suffix != ".safetensors":
            raise UserError(
                f"{source.name} is not a .safetensors file; "
                "other formats can carry code and are not opened"
            )
        # Each upload has a folder of its own, so that no other file lies beside it.
        reserved_names = {run_folder.NO_ADAPTER, *self.list_files()}
        name = find_free_name(run_folder.clean_name(source.stem), reserved_names.__contains__, " ")
        folder = Path(tempfile.mkdtemp(prefix="adapter-", dir=self.workspace.folder))
        target = folder / f"{name}.safetensors"
        shutil.copyfile(source, target)
        self.workspace.uploads[name] = target
        return name


_IMPORT_LOCK = threading.Lock()
"""Held by the thread that imports the libraries."""


def import_libraries() -> None:
    """Import torch, diffusers and transformers in the first thread that needs them.

    Other threads wait: these libraries import each other in circles, and two threads would find
    half-made modules. Call it before any import of one. Their progress bars are turned off.
    """
    with _IMPORT_LOCK:
        # These import torch and the pipeline's libraries.
        import dreambooth_moslora.generation.pipeline
        import dreambooth_moslora.lora.describe  # noqa: F401

        disable_library_notes()


@dataclass(frozen=True)
class PageBase:
    """Base that the page offers."""

    title: str
    """Name in the list of bases, for everyone."""
    name: str
    """Name for the trainer; it may be a path."""
    resolution_px: int
    load: Callable[[], "SubjectPipeline"]
    """May raise UserError."""
    description: str = ""
    """Sentence about the base without its first word and full stop."""
    note: str = ""
    """Note beside its title in the list, such as a download."""
    problem: str = ""
    """Reason why it could not be found when the page started."""
    public_name: str = ""
    """Name of the base in its images, if not the title."""

    @property
    def label(self) -> str:
        """Return the title with the note."""
        return f"{self.title} ({self.note})" if self.note else self.title

    @property
    def is_small(self) -> bool:
        """Return whether it is too small to need care with memory, such as the embedded base."""
        return self.resolution_px <= MAX_SMALL_BASE_PX


class AppContext:
    """State of the server, which offers these bases and begins to load the first.

    - `adapters_dir` has adapters to offer.
    - `runs_dir` has the runs.
    - `workspace` stores the files that come from the browser.
    - A `public` page only generates.
    """

    def __init__(
        self,
        *page_bases: PageBase,
        adapters_dir: Path,
        runs_dir: Path,
        workspace: Workspace,
        public: bool = False,
    ) -> None:
        self._set_base(page_bases[0])
        self.bases = {base.title: base for base in page_bases}
        self.runs_dir = runs_dir
        self.workspace = workspace
        self.public = public
        self.catalog = AdapterCatalog(adapters_dir, None if public else runs_dir, workspace)
        # Session of a page -> the stop of its work, running or waiting.
        self._stops: dict[str, threading.Event] = {}
        self.turns = GpuLock(self)
        self.jobs = jobs.Jobs(runs_dir, make_room=self.turns.reserve_for_training)
        self.queue = jobs.QueueRunner(self.jobs)
        self._load_lock = threading.Lock()
        self._pipeline: Future[SubjectPipeline] | None = self._start_loading(self.current_base)

    def _set_base(self, base: PageBase) -> None:
        """Make it the base of every page: `base` is its title, `base_name` goes to the trainer."""
        self.current_base = base
        self.base = base.title
        self.base_name = base.name
        self.resolution_px = base.resolution_px
        self.public_name = base.public_name or base.title
        # A broken base is reported when it is loaded.
        self.facts, self.guidance_scale = SDXL, SDXL.guidance
        with suppress(UserError):
            files = Base.find(base.name)
            self.facts, self.guidance_scale = files.facts or SDXL, files.guidance

    def choose(self, base: PageBase) -> Iterator[float]:
        """Load another base in place of the present one, which stays if that fails.

        Yields the seconds so far. It does not wait for running images: call it in their queue.
        Raises UserError for a base that cannot be loaded.
        """
        if base is self.current_base:
            return
        # Two large bases do not fit. A page that needs the present one loads it again.
        if not self.current_base.is_small:
            self.release_pipeline()
        began = time.monotonic()
        loading = self._start_loading(base)
        while wait([loading], timeout=POLL_SEC).not_done:
            yield time.monotonic() - began
        # Raises the error of loading, if there was one.
        loading.result()
        with self._load_lock:
            self._set_base(base)
            self._pipeline = loading
        processes.release_freed_memory()

    def get_loaded_pipeline(self) -> "SubjectPipeline | None":
        """Return the pipeline; None while it loads, and if that has failed."""
        loading = self._pipeline
        if loading and loading.done() and loading.exception() is None:
            return loading.result()
        return None

    def release_pipeline(self) -> None:
        """Free the pipeline's memory, after its loading has ended.

        The next page that needs it loads it again.
        """
        with self._load_lock:
            if self._pipeline is not None:
                wait([self._pipeline])
            self._pipeline = None
        processes.release_freed_memory()

    def wait_for_pipeline(self) -> "SubjectPipeline":
        """Wait for the pipeline and return it; a failed load is tried again.

        Raises UserError when that fails.
        """
        with self._load_lock:
            loading = self._pipeline
            if loading is None or (loading.done() and loading.exception() is not None):
                loading = self._pipeline = self._start_loading(self.current_base)
        return loading.result()

    def _start_loading(self, base: PageBase) -> "Future[SubjectPipeline]":
        """Begin to load a base's pipeline in a thread; its errors are all UserErrors."""
        future: Future[SubjectPipeline] = Future()

        def load_and_resolve() -> None:
            try:
                future.set_result(base.load())
            except UserError as error:
                logger.error("The base could not be loaded: %s", error)
                future.set_exception(error)
            except Exception:
                logger.exception("The base could not be loaded")
                user_error = UserError("the base could not be loaded; the server's log says why")
                future.set_exception(user_error)

        threading.Thread(target=load_and_resolve, name="load-base", daemon=True).start()
        return future

    def load_adapters(self, params: GenerationParams) -> GenerationParams:
        """Apply tags and load every adapter into the model.

        Raises UserError for an unknown or unsuitable one.
        """
        params = params.apply_tags()
        for name, _ in params.adapters:
            self.wait_for_pipeline().load_adapter(self.catalog.find_file(name), name)
        return params

    def register_work(self, request: gr.Request) -> None:
        """Register this page's work in the queue, so that it can be stopped before its turn."""
        session = get_session_name(request)
        stop = self._stops.get(session)
        # A stop does not count for work that is registered later.
        if stop is None or stop.is_set():
            self._stops[session] = threading.Event()
        # Sessions that register and never generate are forgotten, the oldest first.
        while len(self._stops) > MAX_STOPS:
            del self._stops[next(iter(self._stops))]

    @contextmanager
    def track_work(self, request: gr.Request) -> Iterator[Callable[[], bool]]:
        """Yield `should_stop` of this page's work, which a program need not register."""
        session = get_session_name(request)
        stop = self._stops.setdefault(session, threading.Event())
        try:
            yield stop.is_set
        finally:
            self._stops.pop(session, None)

    def stop(self, request: gr.Request) -> None:
        """Stop this page's own work, running or waiting, never another page's."""
        stop = self._stops.get(get_session_name(request))
        if stop is not None:
            stop.set()


def get_session_name(request: gr.Request) -> str:
    """Return the name of a page's session, cut short: a request may send any length."""
    return (request.session_hash or "")[:MAX_SESSION_CHARACTERS]


BUSY_MESSAGE = (
    "this machine is training a run; "
    "pictures can be drawn again when the run has ended or is stopped"
)
"""Error for a request of images while a run trains."""


class GpuLock:
    """Lock that keeps the pipeline off the GPU while a run trains.

    A GPU rarely holds SDXL twice, but a small base fits. The pipeline moves to the host while a run
    trains.
    """

    def __init__(self, ctx: AppContext) -> None:
        self._ctx = ctx
        # No RLock: the generator may be closed by another thread than the one that locked.
        self._lock = threading.Lock()

    @contextmanager
    def reserve_for_images(self) -> Iterator[None]:
        """Wrap all images of a request.

        Raises UserError while a run trains that leaves no room for the base.
        """
        if self._ctx.current_base.is_small:
            yield
            return
        # Load outside the lock, as it takes long.
        self._ctx.wait_for_pipeline()
        # Under the lock no run begins.
        with self._lock:
            if self._ctx.jobs.find_active_job():
                raise UserError(BUSY_MESSAGE)
            yield

    @contextmanager
    def reserve_for_training(self) -> Iterator[None]:
        """Wrap a run's start: wait for the current images, then make room."""
        with self._lock:
            # A pipeline that is still loading is in RAM.
            pipeline = self._ctx.get_loaded_pipeline()
            is_small = self._ctx.current_base.is_small
            if pipeline is not None and pipeline.has_gpu and not is_small:
                pipeline.rest()
            yield
