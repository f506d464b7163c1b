"""SubjectPipeline: a base, any number of adapters with their scales, and pictures that are yielded
one by one.

    GenerationParams --generate--> Step, Preview … Image

The same parameters give the same pixels for any `num_images`.
"""

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora import __version__
from dreambooth_moslora.base import decode, devices, families, load
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.run_folder import find_weights
from dreambooth_moslora.errors import StopRequestedError, UserError, is_out_of_memory
from dreambooth_moslora.generation import sampling
from dreambooth_moslora.generation.image_params import (
    SCHEDULERS,
    GenerationParams,
    Image,
    Provenance,
    Step,
    check_sides,
)
from dreambooth_moslora.generation.offload import CPU, Placement
from dreambooth_moslora.generation.previews import LatentColours, Preview, StepCallback, StepClock
from dreambooth_moslora.lora import metadata, reader

Item = TypeVar("Item")
# A file's place, time (ns) and size (bytes): an unchanged one need not be read again
FileStamp = tuple[Path, int, int]
# Adapters kept in the model; the least recently used one is dropped first
RESIDENT_ADAPTERS = 8
Event = Step | Preview | Image


def stream_events(
    work: Callable[[Callable[[Item], None], Callable[[], bool]], None],
) -> Iterator[Item]:
    """Run `work(emit, abandoned)` in a thread; yield what it emits until either ends, and raise its
    exception."""
    # The thread that works
    events: queue.SimpleQueue = queue.SimpleQueue()
    abandoned = threading.Event()  # the consumer has closed the iterator

    def run_work() -> None:
        try:
            work(events.put, abandoned.is_set)
            events.put(None)
        except BaseException as error:  # raised by the consumer
            events.put(error)

    thread = threading.Thread(target=run_work, name="generate", daemon=True)
    thread.start()

    # Its events, until it ends or nobody listens any more
    try:
        while True:
            event = events.get()
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        abandoned.set()
        thread.join()


@dataclass(frozen=True)
class Adapter:
    """An adapter in the model."""

    key: str  # the name inside PEFT
    sha256: str
    header: dict[str, str]  # the file's metadata
    stamp: FileStamp


def find_scheduler_name(scheduler: diffusers.SchedulerMixin) -> str | None:
    """The name of a base's own scheduler in `SCHEDULERS`; None if it has none there."""
    kind = type(scheduler).__name__.removeprefix("FlowMatch")
    for name, known in SCHEDULERS.items():
        if kind != known.class_name:
            continue
        if all(scheduler.config.get(key) == value for key, value in known.options.items()):
            return name
    return None


class SubjectPipeline:
    """Base and adapters, for one caller at a time; other threads wait.

    pipeline: the base, as diffusers has it
    base_name: its public name, for the recipes of pictures
    home: the device that draws; by default where the pipeline is

    A pipeline that is elsewhere rests in the CPU's memory until `generate`. If `home` is short of
    memory, its models take turns on it.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, base_name: str, home: str | torch.device | None = None
    ) -> None:
        self.resident_adapters = RESIDENT_ADAPTERS
        self.pipeline = pipeline
        self.base_name = base_name
        self.home = Placement(pipeline, torch.device(home or pipeline.device))
        self.adapters: dict[str, Adapter] = {}
        self.family = families.build_family(pipeline)
        self._active: dict[str, float] | None = None
        self._base_scheduler = pipeline.scheduler
        self._lock = threading.RLock()
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_base(
        cls,
        base: Base | str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        *,
        resting: bool = False,
    ) -> "SubjectPipeline":
        """Load a base, or the base of that name: "toy", a folder, a hub id or a file. It is drawn
        with by whichever of its files are here.

        dtype: by default a half precision that suits its family on a GPU, else fp32
        device: a GPU by default
        resting: stay in the CPU's memory until used

        Raises UserError.
        """
        base = Base.find(base)
        base = replace(base, variant=base.variant or base.local_variant)
        device = torch.device(device or devices.get_best_device())

        # Flows were trained in bf16, and their activations overflow in fp16.
        half = torch.bfloat16 if base.is_flow else torch.float16
        dtype = dtype or (half if device.type in ("cuda", "mps") else torch.float32)
        subject = cls(load.load_pipeline(base, dtype=dtype), base.public_name, device)

        # Models that take turns are moved with the first picture.
        if not (resting or subject.home.is_memory_short):
            subject.home.enter()
        return subject

    @property
    def has_gpu(self) -> bool:
        return self.home.device != CPU

    def rest(self) -> None:
        """Free the GPU until the next `generate`, after the current generation has ended."""
        if self.has_gpu:
            with self._lock:
                self.home.leave()

    @property
    def resolution_px(self) -> int:
        return load.get_default_resolution(self.pipeline)

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Load an adapter file (this program's, diffusers', kohya's) or a run folder into the
        model; returns its name.

        An unchanged file that is already loaded costs nothing. Raises UserError when it is no
        adapter for this base.
        """
        name = name or reader.get_adapter_name(path)
        file = find_weights(path)
        facts = file.stat()
        stamp = (file.resolve(), facts.st_mtime_ns, facts.st_size)
        with self._lock:
            known = self.adapters.get(name)
            if known is not None and known.stamp == stamp:
                self._track_use(name)
                return name

            # The new one comes first: if it cannot be loaded, the old one stays.
            adapter = self._install_adapter(name, file, stamp)
            self._remove_adapter(name, unless=adapter.key)
            self.adapters[name] = adapter
            self._drop_least_recent()
        return name

    def _install_adapter(self, name: str, file: Path, stamp: FileStamp) -> Adapter:
        """Read the file and put its weights into the model. Raises UserError."""
        weights = reader.read_adapter(file, self.pipeline)
        reader.check_fits(weights, self.pipeline)

        # Files of equal content share their weights.
        if weights.key not in self._list_keys():
            self._active = None
            reader.install(weights, self.pipeline)
        return Adapter(
            key=weights.key,
            sha256=weights.sha256,
            header=weights.header,
            stamp=stamp,
        )

    def unload_adapter(self, name: str) -> None:
        """Remove the adapter of that name from the model, if it is there."""
        with self._lock:
            self._remove_adapter(name)

    def generate(
        self, params: GenerationParams, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[Step | Preview | Image]:
        """Yield Step and Preview for each denoising step, Image for each picture, until
        `should_stop()` or the iterator is closed. Raises UserError for an adapter that is not
        loaded, and for want of memory."""
        params = self.complete(params)

        def run_generation(emit: Callable[[Event], None], abandoned: Callable[[], bool]) -> None:
            stop = (lambda: abandoned() or should_stop()) if should_stop else abandoned
            with self._lock, torch.no_grad():
                self._generate_all(params, emit, stop)

        return stream_events(run_generation)

    def draw(self, params: GenerationParams, should_stop: Callable[[], bool] = bool) -> list[Image]:
        """The finished pictures of `generate`; fewer than requested after a stop."""
        events = self.generate(params, should_stop)
        return [event for event in events if isinstance(event, Image)]

    def complete(self, params: GenerationParams) -> GenerationParams:
        """With tags applied, and the base's sizes, guidance and scheduler. Raises UserError for an
        unknown adapter, and for a scheduler that knows nothing of the base's noise levels."""
        params = params.apply_tags()
        for name, _ in params.adapters:
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise UserError(f"adapter {name!r:.60} is not loaded; loaded are: {known}")

        # The base's scheduler is named only if a PNG can name it.
        scheduler = params.scheduler or find_scheduler_name(self._base_scheduler)
        if scheduler and "EDM" in type(self._base_scheduler).__name__:
            title = SCHEDULERS[scheduler].title
            raise UserError(
                f"{title} does not know the noise levels of this base, which are EDM's: "
                "leave the scheduler out, and the base's own is taken"
            )
        guidance = params.guidance_scale
        if guidance is None:
            guidance = load.get_default_guidance(self.pipeline)
        return replace(
            params,
            guidance_scale=guidance,
            scheduler=scheduler,
            height_px=params.height_px or self.resolution_px,
            width_px=params.width_px or self.resolution_px,
        )

    def activate(self, adapters: tuple[tuple[str, float], ...]) -> None:
        """Make exactly these adapters active; scales of files of equal content add up. Scale 0
        means absent: the result is the base's, bit for bit."""
        totals = defaultdict(float)
        for name, scale in adapters:
            totals[self.adapters[name].key] += scale
        active = {key: total for key, total in totals.items() if total}

        # Only on a change: PEFT walks over all modules.
        if active != self._active:
            if active:
                self.pipeline.enable_lora()
                self.pipeline.set_adapters(list(active), list(active.values()))
            elif self.adapters:
                self.pipeline.disable_lora()
            self._active = active

    def family_for(
        self, adapters: Iterable[tuple[str, float]], given: Mapping[str, Any] | None = None
    ) -> families.Family:
        """The family with the `given` text options, and else with those of the first adapter whose
        run set them. Raises UserError for one that is not the family's."""
        facts = self.family.facts
        options = dict(given or {})
        for name in options:
            if name not in facts.text_options:
                raise UserError(f"--{name} is not for {facts.title}; leave it out")

        # What the active adapters were trained with
        for name, scale in adapters:
            told = metadata.parse_text_options(self.adapters[name].header) if scale else {}
            for option, value in told.items():
                if option in facts.text_options:
                    options.setdefault(option, value)
        return families.build_family(
            self.pipeline, options=families.build_encoding_options(options)
        )

    def provenance(self, params: GenerationParams) -> Provenance:
        """The files and programs that draw pictures of these parameters."""
        hashes = tuple((name, self.adapters[name].sha256) for name, _ in params.adapters)
        versions = (
            ("dreambooth_moslora", __version__),
            ("diffusers", version("diffusers")),
            ("torch", version("torch")),
        )
        return Provenance(base=self.base_name, adapter_sha256=hashes, versions=versions)

    def _generate_all(
        self, params: GenerationParams, emit: Callable[[Event], None], stop: Callable[[], bool]
    ) -> None:
        """Draw all pictures of complete parameters, until `stop()`. Raises UserError."""
        try:
            self.home.enter()
            check_sides((params.height_px, params.width_px), self.family.facts)

            # Adapters and words, once for all pictures
            for name, _ in params.adapters:
                self._track_use(name)
            self.activate(params.adapters)
            words = self._encode(params)

            # The pictures, one by one
            clock = StepClock(params.num_images)
            for index in range(params.num_images):
                self._generate_image(
                    index=index, params=params, words=words, clock=clock, emit=emit, stop=stop
                )
        except StopRequestedError:
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            devices.free_unused_blocks(self.home.device)
            size = f"{params.height_px} x {params.width_px} px"
            raise UserError(
                f"there is too little memory for {size}; choose a smaller size"
            ) from error
        finally:
            self.pipeline.scheduler = self._base_scheduler
            if self.home.is_resting:  # the models took turns
                self.home.leave()

    def _generate_image(
        self,
        index: int,
        params: GenerationParams,
        words: dict[str, torch.Tensor | None],
        clock: StepClock,
        emit: Callable[[Event], None],
        stop: Callable[[], bool],
    ) -> None:
        """Draw one picture.

        index: of the picture, from 0
        params: of all pictures
        words: what `_encode` gave
        clock: for the remaining time of all pictures
        emit: takes the events
        stop: whether to stop, asked after each step; raises StopRequestedError then
        """
        if stop():
            raise StopRequestedError
        own = params.for_image(index)
        is_flow = self.family.facts.style == "flow"

        # A flow's sampler is part of the model; its latents are packed and have no preview.
        if not is_flow:
            self.pipeline.scheduler = self._build_scheduler(own.scheduler)
        watcher = StepCallback(
            index=index,
            params=own,
            clock=clock,
            colours=None if is_flow else self.colours,
            emit=emit,
            stop=stop,
        )
        pixels = sampling.draw_pixels(
            self.pipeline,
            words,
            seeds=[own.seed],
            size_px=(own.height_px, own.width_px),
            guidance=own.guidance_scale,
            num_inference_steps=own.steps,
            callback_on_step_end=watcher,
        )
        (picture,) = decode.to_images(self._blacken_unsafe(pixels))
        image = Image(
            index=index,
            pixels=picture,
            params=own,
            provenance=self.provenance(own),
        )
        emit(image)

    def _blacken_unsafe(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the pixels (B, 3, h, w), about in [0, 1], of which those pictures are black that
        the base's safety checker refuses. Most bases have none."""
        if getattr(self.pipeline, "safety_checker", None) is None:
            return pixels

        # It is given what the VAE gives, in [-1, 1].
        dtype = families.get_denoiser(self.pipeline).dtype
        _, is_unsafe = self.pipeline.run_safety_checker(pixels * 2 - 1, pixels.device, dtype)
        is_safe = torch.tensor(is_unsafe, device=pixels.device).logical_not()
        return pixels.where(is_safe[:, None, None, None], 0)

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        """Text conditioning for all images of a call, as in training."""
        family = self.family_for(params.adapters, dict(params.text_options))
        (said,) = family.encode_prompts(self.pipeline, [params.prompt])
        against = family.encode_negative(self.pipeline, params.negative_prompt)
        return family.add_negative(family.collate([said]), family.collate([against]))

    def _build_scheduler(self, name: str | None) -> diffusers.SchedulerMixin:
        """A scheduler of that name, or the base's own, at the noise levels of the base's own."""
        own = self._base_scheduler
        kind = getattr(diffusers, SCHEDULERS[name].class_name) if name else type(own)
        return kind.from_config(own.config, **SCHEDULERS[name].options if name else {})

    @cached_property
    def colours(self) -> LatentColours:
        """The map of the previews, fitted with the first picture."""
        return LatentColours(self.pipeline.vae, self.pipeline._execution_device)

    def _track_use(self, name: str) -> None:
        """Mark as just used, so that `_drop_least_recent` drops others first."""
        self.adapters[name] = self.adapters.pop(name)

    def _drop_least_recent(self) -> None:
        """Drop adapters, from the least recently used one on."""
        while len({adapter.sha256 for adapter in self.adapters.values()}) > self.resident_adapters:
            self._remove_adapter(next(iter(self.adapters)))

    def _remove_adapter(self, name: str, unless: str = "") -> None:
        """Remove an adapter, and its weights from the model unless another one has them or their
        key is `unless`."""
        gone = self.adapters.pop(name, None)
        if gone and gone.key != unless and gone.key not in self._list_keys():
            self.pipeline.delete_adapters(gone.key)
            self._active = None

    def _list_keys(self) -> set[str]:
        """Keys of the adapters in the model; files of equal content share one."""
        return {adapter.key for adapter in self.adapters.values()}
