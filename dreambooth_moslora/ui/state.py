"""State shared by all tabs: the pipeline (which loads while the page is already up), adapters, visitors, and stops."""

import errno
import functools
import gc
import html
import inspect
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from dreambooth_moslora.base.files import SMALL_BASE_PX
from dreambooth_moslora.core import UserError, one_line, preferred_guidance
from dreambooth_moslora.disk.processes import give_freed_memory_back
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.ui.adapters import AdapterCatalog
from dreambooth_moslora.ui.jobs import GpuTurns, Jobs, QueueTurns
from dreambooth_moslora.ui.visitors import Visitor, Visitors, visitor_id

if TYPE_CHECKING:
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

GPU = {"concurrency_id": "gpu", "concurrency_limit": 1}
"""Options of every event that computes: one at a time, the others wait in one queue."""

AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of small events outside the queue, whose errors and remarks the page does not show: they must not raise."""
TELLING = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Options of small events with a message: errors and remarks reach the page only through the queue."""

MAX_WAITING = 1000
MAX_SENTENCE = 300
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Page = tuple[str, str]
"""Visitor and session."""

logger = logging.getLogger(__name__)


_ONE_AT_A_TIME = threading.Lock()
TELLS_PROMPTS = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"
"""The logger whose warning repeats the end of a prompt that is too long."""


def import_libraries() -> None:
    """Import torch, diffusers and transformers in the first thread that needs them, while the others wait.

    They import each other in circles: two threads that start at different places would find half-made modules. Call it
    before importing, inside a function of the page, a module that needs one of them.
    """
    with _ONE_AT_A_TIME:
        import dreambooth_moslora.adapters.describe
        import dreambooth_moslora.generation.grids  # and by it the pipeline  # noqa: F401

        logging.getLogger(TELLS_PROMPTS).addFilter(_tells_no_prompt)


def _tells_no_prompt(record: logging.LogRecord) -> bool:
    return "your input was truncated" not in str(record.msg)


class AppContext:
    """State of the server. `load` returns the pipeline; it runs in a thread from the start.

    `base` is shown to everyone; the trainer gets `base_name`, which may be a path of this machine. Strangers can
    reach a `public` page.
    """

    def __init__(
        self,
        load: Callable[[], "SubjectPipeline"],
        *,
        base: str,
        base_name: str,
        resolution_px: int,
        adapters_dir: Path,
        runs_dir: Path,
        training: bool,
        public: bool = False,
    ) -> None:
        self.base, self.base_name, self.resolution_px = base, base_name, resolution_px
        self.runs_dir = runs_dir
        self.training, self.public = training, public
        self.visitors = Visitors()
        self.catalog = AdapterCatalog(adapters_dir, runs_dir)
        self._stops: dict[Page, threading.Event] = {}
        self._waiting: OrderedDict[Page, threading.Event] = OrderedDict()
        is_small = resolution_px <= SMALL_BASE_PX
        self.turns = GpuTurns(self.pipeline, self.loaded, self.unload, self.is_training, is_small=is_small)
        self.jobs = Jobs(runs_dir, make_room=self.turns.training)
        self.queue = QueueTurns(self.jobs)
        self.jobs.public_names |= {f"{adapters_dir}/": ""} | ({base_name: base} if os.sep in base_name else {})
        self._load, self._load_lock = load, threading.Lock()
        self._pipeline: Future[SubjectPipeline] | None = self._loading()

    @property
    def guidance_scale(self) -> float:
        """The base's own guidance."""
        return preferred_guidance(self.base_name)

    @property
    def is_ready(self) -> bool:
        return self.loaded() is not None

    def loaded(self) -> "SubjectPipeline | None":
        """The pipeline, or None while it is not loaded."""
        loading = self._pipeline
        return loading.result() if loading and loading.done() and loading.exception() is None else None

    def is_training(self) -> bool:
        return self.jobs.current() is not None

    def unload(self) -> None:
        """Free the pipeline's memory, after its loading has ended; the next who needs it loads it again."""
        with self._load_lock:
            if self._pipeline is not None:
                wait([self._pipeline])
            self._pipeline = None
        gc.collect()
        give_freed_memory_back()

    def pipeline(self) -> "SubjectPipeline":
        """The pipeline, after waiting for it; a failed load is tried again. Raises UserError when that fails."""
        with self._load_lock:
            loading = self._pipeline
            if loading is None or (loading.done() and loading.exception() is not None):
                loading = self._pipeline = self._loading()
        return loading.result()

    def _loading(self) -> "Future[SubjectPipeline]":
        """The future pipeline, which loads in a thread."""

        def load() -> "SubjectPipeline":
            self.turns.check_memory()
            return self._load()

        future: Future[SubjectPipeline] = Future()
        threading.Thread(target=_fulfil, args=(future, load, self.jobs.told), name="load-base", daemon=True).start()
        return future

    def load_adapters(self, params: GenerationParams, visitor: Visitor) -> GenerationParams:
        """Apply tags and load every adapter into the model. Raises UserError for an unknown or unsuitable one."""
        params = params.apply_tags()
        for name, _ in params.adapters:
            self.pipeline().load_adapter(self.catalog.path(name, visitor), name)
        return params

    def announce(self, request: gr.Request) -> None:
        """This page's work is about to join the queue: from now on it can be stopped, even before its turn."""
        self._waiting[_page_of(request)] = threading.Event()
        while len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)

    @contextmanager
    def stoppable(self, request: gr.Request) -> Iterator[Callable[[], bool]]:
        """`should_stop` of this page's work; the page's next work gets a new one."""
        page = _page_of(request)
        stop = self._stops[page] = self._waiting.pop(page, None) or threading.Event()
        try:
            yield stop.is_set
        finally:
            if self._stops.get(page) is stop:
                del self._stops[page]

    def stop(self, request: gr.Request) -> None:
        """Stop this page's own work, running or waiting. Another page's cannot be stopped."""
        for works in (self._stops, self._waiting):
            if stop := works.get(_page_of(request)):
                stop.set()


def _page_of(request: gr.Request) -> Page:
    """The visitor and the page: the session's name is chosen by the client, so it alone grants nothing."""
    return visitor_id(request), str(request.session_hash)


def _fulfil(future: Future, load: Callable[[], "SubjectPipeline"], told: Callable[[str], str]) -> None:
    try:
        future.set_result(load())
    except UserError as error:
        logger.error("The base could not be loaded: %s", error)
        future.set_exception(UserError(told(str(error))))
    except Exception:
        logger.exception("The base could not be loaded")
        future.set_exception(UserError("the base could not be loaded; the server's log says why"))


def as_gradio_error(handler: Callable) -> Callable:
    """A decorator: a handler's error becomes a message on the page (`as_user_error`), escaped, as it may quote
    a visitor."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def guarded(*args, **kwargs):
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise as_message(error) from error
    else:

        @functools.wraps(handler)
        def guarded(*args, **kwargs):
            try:
                return handler(*args, **kwargs)
            except Exception as error:
                raise as_message(error) from error

    return guarded


def as_message(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    words = html.escape(sentence(as_user_error(error)), quote=False)
    return gr.Error(words, duration=12, print_exception=False)


def as_user_error(error: Exception) -> UserError:
    """A UserError unchanged; a message for a full disk; for any other error, which is a bug, a reference to the log."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return UserError("the server's disk is full; free some space and try again")
    logger.error("A handler of the page failed", exc_info=error)
    return UserError("something went wrong; the server's log says what")


def sentence(error: Exception | str) -> str:
    """The text of an error or a remark, capitalised. It may quote half a surrogate pair, which is replaced."""
    text = one_line(error, MAX_SENTENCE).encode("utf-8", "replace").decode()
    return text[:1].upper() + text[1:]
