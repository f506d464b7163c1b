"""SubjectPipeline: a base with any number of adapters and their scales, which yields images one by
one.

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
FileStamp = tuple[Path, int, int]
"""Path, time (ns) and size (bytes) of a file: an unchanged one need not be read again."""
RESIDENT_ADAPTERS = 8
"""Number of adapters kept in the model; the least recently used is dropped first."""
Event = Step | Preview | Image


def stream_events(
    work: Callable[[Callable[[Item], None], Callable[[], bool]], None],
) -> Iterator[Item]:
    """Run `work(emit, abandoned)` in a thread, yield the emitted events until either side ends, and
    raise its exception."""
    # Start the thread.
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

    # Yield its events until it ends or the iterator is closed.
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
    """Adapter in the model."""

    key: str  # the name inside PEFT
    sha256: str
    header: dict[str, str]  # the file's metadata
    stamp: FileStamp


def find_scheduler_name(scheduler: diffusers.SchedulerMixin) -> str | None:
    """Return the name of a base's scheduler in `SCHEDULERS`, or None if it has none."""
    class_name = type(scheduler).__name__.removeprefix("FlowMatch")
    for name, candidate in SCHEDULERS.items():
        if class_name != candidate.class_name:
            continue
        if all(scheduler.config.get(key) == value for key, value in candidate.options.items()):
            return name
    return None


class SubjectPipeline:
    """Base and adapters, for one caller at a time; other threads wait.

    pipeline: the base, as diffusers has it
    base_name: its public name, for the recipes of images
    home: the device that generates; by default where the pipeline is
    base: from which the pipeline was loaded; decides the default size and guidance scale, which are
        those of the family if it is not given

    A pipeline that is elsewhere rests in the CPU's memory until `generate`. If `home` is short of
    memory, its models take turns on it.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        base_name: str,
        home: str | torch.device | None = None,
        base: Base | None = None,
    ) -> None:
        self.resident_adapters = RESIDENT_ADAPTERS
        self.pipeline = pipeline
        self.base_name = base_name
        self.home = Placement(pipeline, torch.device(home or pipeline.device))
        self.adapters: dict[str, Adapter] = {}
        self.family = families.build_family(pipeline)
        self.resolution_px = base.resolution_px if base else self.family.facts.resolution_px
        self.guidance_scale = base.guidance if base else self.family.facts.guidance
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
        """Load a base: "toy", a folder, a hub id, a file, or a `Base`. It uses whichever variant of
        its files is on this machine.

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
        subject = cls(load.load_pipeline(base, dtype=dtype), base.public_name, device, base)

        # Models that take turns are moved with the first image.
        if not (resting or subject.home.is_memory_short):
            subject.home.enter()
        return subject

    @property
    def has_gpu(self) -> bool:
        """Tell whether images are generated on a GPU."""
        return self.home.device != CPU

    def rest(self) -> None:
        """Free the GPU until the next `generate`, after the current generation has ended."""
        if self.has_gpu:
            with self._lock:
                self.home.leave()

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Load an adapter file (this program's, diffusers', kohya's) or a run folder into the
        model. Return its name.

        An unchanged file that is already loaded costs nothing. Raises UserError if it is no adapter
        for this base.
        """
        name = name or reader.get_adapter_name(path)

        # Keep an adapter whose file has not changed.
        file = find_weights(path)
        facts = file.stat()
        stamp = (file.resolve(), facts.st_mtime_ns, facts.st_size)
        with self._lock:
            current = self.adapters.get(name)
            if current is not None and current.stamp == stamp:
                self._track_use(name)
                return name

            # Install first: if the new file cannot be loaded, the old adapter stays.
            adapter = self._install_adapter(name, file, stamp)
            self._remove_adapter(name, except_key=adapter.key)
            self.adapters[name] = adapter
            self._drop_least_recent()
        return name

    def _install_adapter(self, name: str, file: Path, stamp: FileStamp) -> Adapter:
        """Read the file and put its weights into the model. Raises UserError."""
        weights = reader.read_adapter(file, self.pipeline)
        reader.check_fits(weights, self.pipeline)

        # Files with equal content share their weights.
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
        """Remove the adapter with that name from the model, if it is loaded."""
        with self._lock:
            self._remove_adapter(name)

    def generate(
        self, params: GenerationParams, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[Event]:
        """Yield Step and Preview for each denoising step and Image for each image, until
        `should_stop()` is true or the iterator is closed. Raises UserError for an adapter that is
        not loaded, and for too little memory."""
        params = self.complete(params)

        def run_generation(emit: Callable[[Event], None], abandoned: Callable[[], bool]) -> None:
            stop = (lambda: abandoned() or should_stop()) if should_stop else abandoned
            with self._lock, torch.no_grad():
                self._generate_all(params, emit, stop)

        return stream_events(run_generation)

    def draw(self, params: GenerationParams, should_stop: Callable[[], bool] = bool) -> list[Image]:
        """Return the finished images of `generate`; fewer than requested after a stop."""
        events = self.generate(params, should_stop)
        return [event for event in events if isinstance(event, Image)]

    def complete(self, params: GenerationParams) -> GenerationParams:
        """Apply tags and fill in the base's sizes, guidance and scheduler. Raises UserError for an
        unknown adapter, and for a scheduler that does not know the base's noise levels."""
        if not isinstance(params, GenerationParams):
            raise UserError(f"give GenerationParams({params!r:.60}) instead of {params!r:.60}")
        # Every adapter that is named must be loaded.
        params = params.apply_tags()
        for name, _ in params.adapters:
            if name not in self.adapters:
                loaded_names = ", ".join(self.adapters) or "none"
                raise UserError(f"adapter {name!r:.60} is not loaded; loaded are: {loaded_names}")

        # Fill in the base's scheduler only if it has a name for the PNG.
        scheduler = params.scheduler or find_scheduler_name(self._base_scheduler)
        if scheduler and "EDM" in type(self._base_scheduler).__name__:
            title = SCHEDULERS[scheduler].title
            raise UserError(
                f"{title} does not know the noise levels of this base, which are EDM's: "
                "leave the scheduler out to use the base's"
            )

        # Fill in the base's guidance and sizes.
        guidance = params.guidance_scale
        if guidance is None:
            guidance = self.guidance_scale
        return replace(
            params,
            guidance_scale=guidance,
            scheduler=scheduler,
            height_px=params.height_px or self.resolution_px,
            width_px=params.width_px or self.resolution_px,
        )

    def activate(self, adapters: tuple[tuple[str, float], ...]) -> None:
        """Make exactly these adapters active; scales of files with equal content add up. Scale 0
        means absent: the result is the base's, bit for bit."""
        totals = defaultdict(float)
        for name, scale in adapters:
            totals[self.adapters[name].key] += scale
        active = {key: total for key, total in totals.items() if total}

        # Act only on a change: PEFT walks over all modules.
        if active != self._active:
            if active:
                self.pipeline.enable_lora()
                self.pipeline.set_adapters(list(active), list(active.values()))
            elif self.adapters:
                self.pipeline.disable_lora()
            self._active = active

    def family_for(
        self, adapters: Iterable[tuple[str, float]], text_options: Mapping[str, Any] | None = None
    ) -> families.Family:
        """Return the family with these text options, completed by those of the first adapter whose
        run set them. Raises UserError for an option that the family lacks."""
        # Check the given options.
        facts = self.family.facts
        options = dict(text_options or {})
        for name in options:
            if name not in facts.text_options:
                raise UserError(f"--{name} is not for {facts.title}; leave it out")

        # Add the options that the active adapters were trained with.
        for name, scale in adapters:
            trained_options = (
                metadata.parse_text_options(self.adapters[name].header) if scale else {}
            )
            for option, value in trained_options.items():
                if option in facts.text_options:
                    options.setdefault(option, value)
        return families.build_family(
            self.pipeline, options=families.build_encoding_options(options)
        )

    def provenance(self, params: GenerationParams) -> Provenance:
        """Return the files and programs that generate images with these parameters."""
        return Provenance(
            base=self.base_name,
            adapter_sha256=tuple((name, self.adapters[name].sha256) for name, _ in params.adapters),
            versions=(
                ("dreambooth_moslora", __version__),
                ("diffusers", version("diffusers")),
                ("torch", version("torch")),
            ),
        )

    def _generate_all(
        self, params: GenerationParams, emit: Callable[[Event], None], stop: Callable[[], bool]
    ) -> None:
        """Generate all images of complete parameters, until `stop()`. Raises UserError."""
        try:
            self.home.enter()
            check_sides((params.height_px, params.width_px), self.family.facts)

            # Activate adapters and encode the prompt, once for all images.
            for name, _ in params.adapters:
                self._track_use(name)
            self.activate(params.adapters)
            family = self.family_for(params.adapters, dict(params.text_options))
            text_embedding = family.encode_conditioning(
                self.pipeline, params.prompt, params.negative_prompt
            )

            # Generate the images one by one.
            clock = StepClock(params.num_images)
            for index in range(params.num_images):
                self._generate_image(
                    index=index,
                    params=params,
                    text_embedding=text_embedding,
                    clock=clock,
                    emit=emit,
                    stop=stop,
                )
        except StopRequestedError:
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            devices.free_unused_memory(self.home.device)
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
        text_embedding: dict[str, torch.Tensor | None],
        clock: StepClock,
        emit: Callable[[Event], None],
        stop: Callable[[], bool],
    ) -> None:
        """Generate one image.

        index: of the image, from 0
        params: of all images
        text_embedding: returned by `encode_conditioning`
        clock: for the remaining time of all images
        emit: takes the events
        stop: called after each step; if true, StopRequestedError is raised
        """
        if stop():
            raise StopRequestedError
        image_params = params.for_image(index)
        is_flow = self.family.facts.style == "flow"

        # A flow's sampler is part of the model; its latents are packed and have no preview.
        if not is_flow:
            self.pipeline.scheduler = self._build_scheduler(image_params.scheduler)
        callback = StepCallback(
            index=index,
            params=image_params,
            clock=clock,
            colours=None if is_flow else self.colours,
            emit=emit,
            stop=stop,
        )

        # Generate the pixels, and emit the image.
        pixels = sampling.generate_pixels(
            self.pipeline,
            text_embedding,
            seeds=[image_params.seed],
            size_px=(image_params.height_px, image_params.width_px),
            guidance=image_params.guidance_scale,
            num_inference_steps=image_params.steps,
            callback_on_step_end=callback,
        )
        (pil_image,) = decode.to_images(self._blacken_unsafe(pixels))
        emit(
            Image(
                index=index,
                pixels=pil_image,
                params=image_params,
                provenance=self.provenance(image_params),
            )
        )

    def _blacken_unsafe(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the pixels (B, 3, h, w), approximately in [0, 1], with images black that the
        base's safety checker refuses. Most bases have no checker."""
        if getattr(self.pipeline, "safety_checker", None) is None:
            return pixels

        # It takes pixels in the VAE's range [-1, 1].
        dtype = families.get_denoiser(self.pipeline).dtype
        _, unsafe_flags = self.pipeline.run_safety_checker(pixels * 2 - 1, pixels.device, dtype)
        safe_flags = torch.tensor(unsafe_flags, device=pixels.device).logical_not()
        return pixels.where(safe_flags[:, None, None, None], 0)

    def _build_scheduler(self, name: str | None) -> diffusers.SchedulerMixin:
        """Create the scheduler with that name, or the base's, at the base's noise levels."""
        base_scheduler = self._base_scheduler
        scheduler_class = (
            getattr(diffusers, SCHEDULERS[name].class_name) if name else type(base_scheduler)
        )
        return scheduler_class.from_config(
            base_scheduler.config, **SCHEDULERS[name].options if name else {}
        )

    @cached_property
    def colours(self) -> LatentColours:
        """Return the map for the previews, fitted with the first image."""
        return LatentColours(self.pipeline.vae, self.pipeline._execution_device)

    def _track_use(self, name: str) -> None:
        """Mark as just used, so that `_drop_least_recent` drops this adapter last."""
        self.adapters[name] = self.adapters.pop(name)

    def _drop_least_recent(self) -> None:
        """Drop adapters, starting with the least recently used."""
        while len({adapter.sha256 for adapter in self.adapters.values()}) > self.resident_adapters:
            self._remove_adapter(next(iter(self.adapters)))

    def _remove_adapter(self, name: str, except_key: str = "") -> None:
        """Remove an adapter, and its weights from the model unless another adapter shares them or
        their key is `except_key`."""
        adapter = self.adapters.pop(name, None)
        if adapter and adapter.key != except_key and adapter.key not in self._list_keys():
            self.pipeline.delete_adapters(adapter.key)
            self._active = None

    def _list_keys(self) -> set[str]:
        """Return the keys of the adapters in the model; files with equal content share one."""
        return {adapter.key for adapter in self.adapters.values()}
