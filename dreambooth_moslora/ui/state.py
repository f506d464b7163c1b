"""State shared by all tabs: the pipeline, adapters, runs, and stops.

The pipeline loads while the page is already up. Adapters are looked up by name: a path that a
request names is never opened.
"""

import gc
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
from dreambooth_moslora.base.model_files import MAX_SMALL_BASE_PX
from dreambooth_moslora.disk import processes, run_folder
from dreambooth_moslora.disk.paths import find_free_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.settings.family_facts import SDXL
from dreambooth_moslora.settings.toy_bases import get_base_guidance
from dreambooth_moslora.ui import jobs
from dreambooth_moslora.ui.workspace import Workspace

if TYPE_CHECKING:
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

SDXL_TITLE = "SDXL"
"""Of the base that is offered for photographs, whether or not its files are here."""
POLL_SEC = 0.5
"""How often the page tells how long a base has been loading."""
MAX_STOPS = 1000
"""Sessions whose stop is kept: a request may name any session."""
MAX_SESSION_CHARACTERS = 32
"""Characters of a session's name that tell it from others."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterCatalog:
    """Finds adapters among the uploads, in a folder of files, and in the runs."""

    adapters_dir: Path
    """Its safetensors files."""
    runs_dir: Path | None
    """Finished runs and their checkpoints; a public page has none."""
    workspace: Workspace
    """The uploads."""

    def list_files(self) -> dict[str, Path]:
        """Name -> file; a checkpoint is `run@step`."""
        uploads = dict(self.workspace.uploads)
        files = sorted(self.adapters_dir.glob("*.safetensors"))
        places = [self.adapters_dir]
        if self.runs_dir is not None:
            files += run_folder.list_run_adapters(list(self.runs_dir.glob("*/")))
            places.append(self.runs_dir)
        return uploads | run_folder.map_adapter_names(files, places, reserved_names=uploads)

    def find_file(self, name: str) -> Path:
        """The file of that name, which is looked up and never joined to a folder.

        Raises UserError for an unlisted name.
        """
        files = self.list_files()
        if name not in files:
            known = ", ".join(files) or "none is there"
            raise UserError(f"there is no adapter {name!s:.60}; choose one of: {known}")
        return files[name]

    def add_upload(self, uploaded: str | Path) -> str:
        """Keep an uploaded file while the page is up; returns its name. Raises UserError."""
        source = Path(uploaded)
        if source.suffix != ".safetensors":
            raise UserError(
                f"{source.name} is not a .safetensors file; "
                "other formats can carry code and are not opened"
            )
        # Each upload has a folder of its own, so that no other file lies beside it.
        taken = {run_folder.NO_ADAPTER, *self.list_files()}
        name = find_free_name(run_folder.clean_name(source.stem), taken.__contains__, " ")
        folder = Path(tempfile.mkdtemp(prefix="adapter-", dir=self.workspace.folder))
        target = folder / f"{name}.safetensors"
        shutil.copyfile(source, target)
        self.workspace.uploads[name] = target
        return name


_IMPORT_LOCK = threading.Lock()
"""Held by the thread that imports the libraries."""


def import_libraries() -> None:
    """Import torch, diffusers and transformers in the first thread that needs them.

    The others wait: these libraries import each other in circles, and two threads would find
    half-made modules. Call it before any import of one.
    """
    with _IMPORT_LOCK:
        # both are imported for what they import: torch, and the pipeline's libraries
        import dreambooth_moslora.generation.pipeline
        import dreambooth_moslora.lora.describe  # noqa: F401


@dataclass(frozen=True)
class PageBase:
    """One base that the page offers."""

    title: str
    """Shown to everyone."""
    name: str
    """What the trainer gets; it may be a path."""
    resolution_px: int
    load: Callable[[], "SubjectPipeline"]
    """May raise UserError."""
    description: str = ""
    """A sentence without its first word and full stop."""
    note: str = ""
    """Beside its title in the list, if something has to be known."""
    problem: str = ""
    """Why it could not be found when the page started."""
    public_name: str = ""
    """What its pictures say, if not the title."""

    @property
    def label(self) -> str:
        """The title and the note."""
        return f"{self.title} ({self.note})" if self.note else self.title

    @property
    def is_small(self) -> bool:
        """Whether it needs no care with memory here, such as the embedded one."""
        return self.resolution_px <= MAX_SMALL_BASE_PX


class AppContext:
    """State of the server, which offers these bases and loads the first from the start.

    - `adapters_dir` has adapters to offer.
    - `runs_dir` has the runs.
    - `workspace` keeps what comes from the browser.
    - A `public` page only draws.
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
        self.bases = {one.title: one for one in page_bases}
        self.runs_dir = runs_dir
        self.workspace = workspace
        self.public = public
        self.catalog = AdapterCatalog(adapters_dir, None if public else runs_dir, workspace)
        # By a page's session: the stop of what it draws, or waits for.
        self._stops: dict[str, threading.Event] = {}
        self.turns = GpuLock(self)
        self.jobs = jobs.Jobs(runs_dir, make_room=self.turns.reserve_for_training)
        self.queue = jobs.QueueRunner(self.jobs)
        self._load_lock = threading.Lock()
        self._pipeline: Future[SubjectPipeline] | None = self._start_loading(self.current_base)

    def _set_base(self, base: PageBase) -> None:
        """Make it the base of every page. `base` is shown, and the trainer gets `base_name`."""
        self.current_base = base
        self.base = base.title
        self.base_name = base.name
        self.resolution_px = base.resolution_px
        self.public_name = base.public_name or base.title
        # What is wrong with a base is told when it is loaded.
        self.facts = SDXL
        with suppress(UserError):
            self.facts = Base.find(base.name).facts or SDXL
        self.guidance_scale = get_base_guidance(base.name, self.facts)

    def choose(self, base: PageBase) -> Iterator[float]:
        """Load another base in place of the present one, which stays if that fails.

        Yields the seconds so far. It waits for no picture: call it in their queue. Raises UserError
        for a base that cannot be loaded.
        """
        if base is self.current_base:
            return
        # Two large ones do not fit. Whoever needs the present one loads it again.
        if not self.turns.is_small:
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
        gc.collect()
        processes.release_freed_memory()

    def get_loaded_pipeline(self) -> "SubjectPipeline | None":
        """The pipeline; None while it loads, and where that has failed."""
        loading = self._pipeline
        if loading and loading.done() and loading.exception() is None:
            return loading.result()
        return None

    def release_pipeline(self) -> None:
        """Free the pipeline's memory, after its loading has ended.

        The next who needs it loads it again.
        """
        with self._load_lock:
            if self._pipeline is not None:
                wait([self._pipeline])
            self._pipeline = None
        gc.collect()
        processes.release_freed_memory()

    def wait_for_pipeline(self) -> "SubjectPipeline":
        """The pipeline, after waiting for it; a failed load is tried again.

        Raises UserError when that fails.
        """
        with self._load_lock:
            loading = self._pipeline
            if loading is None or (loading.done() and loading.exception() is not None):
                loading = self._pipeline = self._start_loading(self.current_base)
        return loading.result()

    def _start_loading(self, base: PageBase) -> "Future[SubjectPipeline]":
        """The pipeline of a base, which a thread begins to load; its errors are all UserErrors."""
        future: Future[SubjectPipeline] = Future()

        def load_and_resolve() -> None:
            try:
                future.set_result(base.load())
            except UserError as error:
                logger.error("The base could not be loaded: %s", error)
                future.set_exception(error)
            except Exception:
                logger.exception("The base could not be loaded")
                told = UserError("the base could not be loaded; the server's log says why")
                future.set_exception(told)

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
        """This page's work joins the queue, and can be stopped even before its turn."""
        session = get_session_name(request)
        stop = self._stops.get(session)
        # What comes after a stop is not stopped by it.
        if stop is None or stop.is_set():
            self._stops[session] = threading.Event()
        # Whoever announces and never draws is forgotten, the oldest first.
        while len(self._stops) > MAX_STOPS:
            del self._stops[next(iter(self._stops))]

    @contextmanager
    def track_work(self, request: gr.Request) -> Iterator[Callable[[], bool]]:
        """`should_stop` of this page's work, which a program need not announce."""
        session = get_session_name(request)
        stop = self._stops.setdefault(session, threading.Event())
        try:
            yield stop.is_set
        finally:
            self._stops.pop(session, None)

    def stop(self, request: gr.Request) -> None:
        """Stop this page's own work, running or waiting; another page's cannot be stopped."""
        stop = self._stops.get(get_session_name(request))
        if stop is not None:
            stop.set()


def get_session_name(request: gr.Request) -> str:
    """The name of a page's session, which is as long as the request likes."""
    return (request.session_hash or "")[:MAX_SESSION_CHARACTERS]


BUSY_MESSAGE = (
    "this machine is training a run; "
    "pictures can be drawn again when the run has ended or is stopped"
)
"""What is told to whoever asks for pictures meanwhile."""


class GpuLock:
    """Keeps the pipeline out of a run's way.

    A GPU rarely holds SDXL twice, but a small base fits. The pipeline moves to the host while a run
    trains.
    """

    def __init__(self, ctx: AppContext) -> None:
        self._ctx = ctx
        # Not an RLock: another thread may close the generator.
        self._lock = threading.Lock()

    @property
    def is_small(self) -> bool:
        """Whether the present base needs no turns."""
        return self._ctx.current_base.is_small

    @contextmanager
    def reserve_for_images(self) -> Iterator[None]:
        """Wraps all pictures of a request.

        Raises UserError while a run trains that leaves no room for the base.
        """
        if self.is_small:
            yield
            return
        # Not under the lock: loading takes long.
        self._ctx.wait_for_pipeline()
        # No run begins meanwhile.
        with self._lock:
            if self._ctx.jobs.find_active_job():
                raise UserError(BUSY_MESSAGE)
            yield

    @contextmanager
    def reserve_for_training(self) -> Iterator[None]:
        """Wraps a run's start: waits for the current pictures, then makes room."""
        with self._lock:
            # One that is loading is in RAM.
            pipeline = None if self.is_small else self._ctx.get_loaded_pipeline()
            if pipeline is not None and pipeline.has_gpu:
                pipeline.rest()
            yield
