"""SubjectPipeline: a base, any number of adapters with their scales, and pictures that are yielded one by one.

GenerationParams --generate--> Step, Preview … Image: the same parameters give the same pixels for any
`num_images`.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora import __version__
from dreambooth_moslora.adapters.files.lora_file import adapter_name, check_fits, install, read_adapter
from dreambooth_moslora.adapters.files.mixer_file import is_mixer_file, read_mixers
from dreambooth_moslora.adapters.new_tokens import AttachedTokens, NewTokens, tokens_beside
from dreambooth_moslora.base.decode import tiled_where_short
from dreambooth_moslora.base.load import default_guidance, default_resolution, guidance_rescale, load_pipeline
from dreambooth_moslora.core.errors import StopRequestedError, UserError, is_out_of_memory
from dreambooth_moslora.core.names import public_name
from dreambooth_moslora.core.run_files.adapter_files import find_weights
from dreambooth_moslora.generation.gpu_room import CPU, Home
from dreambooth_moslora.generation.image import Image
from dreambooth_moslora.generation.loaded_adapter import Adapter, Stamp, stamp_of
from dreambooth_moslora.generation.mixers_on_bases import MixersOnBases
from dreambooth_moslora.generation.params import GenerationParams, Provenance
from dreambooth_moslora.generation.progress import Clock, LatentColours, Preview, Step, Watcher
from dreambooth_moslora.generation.schedulers import make_scheduler
from dreambooth_moslora.generation.streaming import iterate

__all__ = ["Event", "SubjectPipeline"]

RESIDENT_ADAPTERS = 8
"""Default number of adapters kept in the model; the least recently used one is dropped first."""


Event = Step | Preview | Image


class SubjectPipeline:
    """Base and adapters. It generates for one caller at a time: calls from other threads wait.

    `home` is the device that draws. A resting pipeline is in the CPU's memory; `generate` ends the rest. If
    `home` has too little memory for all models, they take turns on it, and rest between calls.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        base_name: str,
        home: str | torch.device | None = None,
    ) -> None:
        self.resident_adapters = RESIDENT_ADAPTERS
        self.pipeline = pipeline
        self.base_name = base_name
        self.home = Home(pipeline, torch.device(home or pipeline.device))
        self.adapters: dict[str, Adapter] = {}
        self.bases = MixersOnBases(pipeline)
        self._active: dict[str, float] | None = None
        self._scheduler_config = pipeline.scheduler.config
        self._tokens: AttachedTokens | None = None
        self._colours: LatentColours | None = None
        self._lock = threading.RLock()
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_base(
        cls,
        name: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        *,
        resting: bool = False,
    ) -> "SubjectPipeline":
        """Load "toy", a folder, a hub id or a single file. Default `device`: the GPU, if there is one.

        `resting`: nothing moves to the GPU before the first `generate`. Raises UserError.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
        subject = cls(load_pipeline(name, dtype=dtype), public_name(name), device)
        if not (resting or subject.home.is_short):
            subject.home.enter()
        return subject

    @property
    def has_gpu(self) -> bool:
        """Whether it draws on another device than the CPU."""
        return self.home.device != CPU

    def rest(self) -> None:
        """Free the GPU until the next `generate`, after the current generation has ended."""
        if not self.has_gpu:
            return
        with self._lock:
            self.home.leave()

    @property
    def resolution_px(self) -> int:
        return default_resolution(self.pipeline)

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Load an adapter file (this program's, diffusers', kohya's) or a run folder into the model; returns its name.

        An unchanged file that is already loaded costs nothing, and mixers alone cost milliseconds once their basis is
        there. New tokens come from the files that its header names, beside it. Raises UserError when it is no adapter
        for this base, or its tokens belong to another.
        """
        name = name or adapter_name(path)
        stamp = stamp_of(find_weights(path))
        with self._lock:
            if name in self.adapters and self.adapters[name].stamp == stamp and not self.adapters[name].lacks_tokens:
                self._touch(name)
                return name
            adapter = self._install(name, find_weights(path), stamp)
            self._forget(name, unless=adapter.key)
            self.adapters[name] = adapter
            self._make_room()
        return name

    def _install(self, name: str, file: Path, stamp: Stamp) -> Adapter:
        if is_mixer_file(file):
            mixers = read_mixers(file)
            if mixers.basis_key not in self._keys():
                self._active = None
                self.bases.prepare(mixers, file)
            return Adapter(name, mixers.basis_key, mixers.sha256, mixers.header, (), stamp, mixers)
        weights = read_adapter(file, self.pipeline)
        check_fits(weights, self.pipeline, self.base_name)
        tokens = tokens_beside(file, weights.header)
        if weights.key not in self._keys():
            self._active = None
            install(weights, self.pipeline)
        return Adapter(name, weights.key, weights.sha256, weights.header, tokens, stamp)

    def unload_adapter(self, name: str) -> None:
        with self._lock:
            self._forget(name)

    def generate(
        self, params: GenerationParams, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[Step | Preview | Image]:
        """Yield Step and Preview for each denoising step and Image for each finished picture.

        Ends early when `should_stop()` is true or the iterator is closed; images already yielded stay valid.
        Raises UserError for an adapter that is not loaded, and when memory does not suffice.
        """
        params = self.complete(params)

        def work(emit: Callable[[Event], None], abandoned: Callable[[], bool]) -> None:
            stop = (lambda: abandoned() or should_stop()) if should_stop else abandoned
            with self._lock, torch.no_grad():
                self._generate_all(params, emit, stop)

        return iterate(work)

    def draw(self, params: GenerationParams, should_stop: Callable[[], bool] = bool) -> list[Image]:
        """The finished pictures of `generate`, drawn in the calling thread; fewer than requested after a stop."""
        params, images = self.complete(params), []

        def keep(event: Event) -> None:
            if isinstance(event, Image):
                images.append(event)

        with self._lock, torch.no_grad():
            self._generate_all(params, keep, should_stop)
        return images

    def complete(self, params: GenerationParams) -> GenerationParams:
        """The parameters with tags applied, and the base's sizes and guidance. Raises UserError for an unknown
        adapter."""
        params = params.apply_tags()
        for name, _ in params.adapters:
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise UserError(f"adapter {name!r:.60} is not loaded; loaded are: {known}")
        side = self.resolution_px
        guidance = default_guidance(self.pipeline) if params.guidance_scale is None else params.guidance_scale
        return replace(
            params,
            guidance_scale=guidance,
            height_px=params.height_px or side,
            width_px=params.width_px or side,
        )

    def activate(self, adapters: tuple[tuple[str, float], ...]) -> None:
        """Make exactly these adapters active, at these scales. Scale 0 means absent: the result is the base's,
        bit for bit."""
        chosen = [(self.adapters[name], scale) for name, scale in adapters if scale != 0]
        active = {adapter.key: scale for adapter, scale in chosen if adapter.mixers is None}
        blended = self.bases.show((adapter.mixers, scale) for adapter, scale in chosen if adapter.mixers is not None)
        active |= dict.fromkeys(blended, 1.0)
        if active != self._active:  # PEFT walks over all modules, which takes longer than swapping mixers
            self._switch(active)
            self._active = active
        self._use_tokens([tokens for adapter, _ in chosen for tokens in adapter.tokens])

    def _switch(self, active: dict[str, float]) -> None:
        if active:
            self.pipeline.enable_lora()
            self.pipeline.set_adapters(list(active), list(active.values()))
        elif self.adapters:
            self.pipeline.disable_lora()

    def _use_tokens(self, wanted: list[NewTokens]) -> None:
        """Make the text encoders know exactly these tokens."""
        if self._tokens is not None:
            self._tokens.detach()
            self._tokens = None
        if wanted:
            self._tokens = AttachedTokens(self.pipeline, wanted)

    def provenance(self, params: GenerationParams) -> Provenance:
        hashes = tuple((name, self.adapters[name].sha256) for name, _ in params.adapters)
        versions = (("dreambooth_moslora", __version__), *((lib, version(lib)) for lib in ("diffusers", "torch")))
        return Provenance(self.base_name, hashes, versions)

    def _generate_all(self, params: GenerationParams, emit: Callable[[Event], None], stop: Callable[[], bool]) -> None:
        try:
            self.home.enter()
            self.home.check_size(params.height_px, params.width_px)
            for name, _ in params.adapters:
                self._touch(name)
            self.activate(params.adapters)
            words = self._encode(params)
            clock = Clock(params)
            for index in range(params.num_images):
                self._generate_one(index, params, words, clock, emit, stop)
        except StopRequestedError:
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            raise UserError(
                f"there is too little memory for {params.height_px} x {params.width_px} px; choose a smaller size"
            ) from error
        finally:
            self.home.end_turns()

    def _generate_one(self, index, params, words, clock, emit, stop) -> None:
        if stop():
            raise StopRequestedError
        own = params.for_image(index)
        self.pipeline.scheduler = self._scheduler(own.scheduler)
        watcher = Watcher(index, own, clock, self.colours(), emit, stop)
        with tiled_where_short(self.pipeline.vae, (own.height_px, own.width_px), self.home.device):
            pixels = self.pipeline(
                **words,
                height=own.height_px,
                width=own.width_px,
                num_inference_steps=own.steps,
                guidance_scale=own.guidance_scale,
                guidance_rescale=guidance_rescale(self.pipeline),
                generator=torch.Generator("cpu").manual_seed(own.seed),
                callback_on_step_end=watcher,
            ).images[0]
        emit(Image(index, pixels, own, self.provenance(own)))

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        """Text conditioning for all images of a call; the negative half only if guidance uses it."""
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeds = self.pipeline.encode_prompt(
            params.prompt,
            device=self.pipeline._execution_device,
            negative_prompt=params.negative_prompt or None,
            do_classifier_free_guidance=params.guidance_scale > 1,
        )
        return dict(zip(names, embeds))

    def _scheduler(self, name: str):
        return make_scheduler(name, self._scheduler_config)

    def colours(self) -> LatentColours:
        if self._colours is None:
            self._colours = LatentColours(self.pipeline.vae, self.pipeline._execution_device)
        return self._colours

    def _touch(self, name: str) -> None:
        """Mark as just used, so that `_make_room` drops others first."""
        self.adapters[name] = self.adapters.pop(name)

    def _make_room(self) -> None:
        while len({adapter.sha256 for adapter in self.adapters.values()}) > self.resident_adapters:
            self._forget(next(iter(self.adapters)))

    def _forget(self, name: str, unless: str = "") -> None:
        gone = self.adapters.pop(name, None)
        if gone and gone.key != unless and gone.key not in self._keys():
            self.pipeline.delete_adapters(gone.key)
            self.bases.forget(gone.key)
            self._active = None

    def _keys(self) -> set[str]:
        """Keys of the adapters in the model; files of equal content share one."""
        return {adapter.key for adapter in self.adapters.values()}
