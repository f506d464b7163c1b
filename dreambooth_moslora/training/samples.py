"""The sample pictures of a run: the same prompts and noise at step 0, during the run and at the end.

At the end it also draws new contexts: the subject where no photo shows it. The pictures of step 0 are read from
the run folder, so that a resumed run has them as well.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from dreambooth_moslora.core import StopRequestedError, seed_of
from dreambooth_moslora.disk.events import SamplesDrawn
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation.fixed_seeds import Sampler, SampleRequest
from dreambooth_moslora.photos.photo import UnreadableImageError, open_image, to_rgb
from dreambooth_moslora.pictures import write_png
from dreambooth_moslora.plan.processes import on_main, share_out
from dreambooth_moslora.settings.prompts import context_prompts, validation_prompts
from dreambooth_moslora.settings.table import TrainConfig


@dataclass
class ValidationSamples:
    """`requests` are drawn at each sampling step, `contexts` once at the end. Both are empty without a prompt."""

    run_dir: RunDir
    requests: list[SampleRequest]
    contexts: list[SampleRequest]
    every_steps: int
    latest: list[Image.Image] = field(default_factory=list)
    latest_step: int = 0

    @classmethod
    def of(cls, config: TrainConfig, run_dir: RunDir, steps_per_epoch: int) -> "ValidationSamples":
        prompts = validation_prompts(config)
        seeds = [seed_of(config.seed, "sample", number) % 2**32 for number in range(config.sample_count)]
        requests = [SampleRequest(prompt, seed) for prompt in prompts for seed in seeds]
        contexts = [SampleRequest(p, seeds[0]) for p in context_prompts(config)] if requests else []
        every = config.validation_steps or config.validation_epochs * steps_per_epoch
        return cls(run_dir, requests, contexts, every)

    def leave_out(self) -> None:
        """Draw no samples in this run."""
        self.requests, self.contexts = [], []

    @property
    def prompts(self) -> list[str]:
        """All prompts that will be drawn."""
        return sorted({request.prompt for request in [*self.requests, *self.contexts]})

    def is_due(self, step: int, last_step: int) -> bool:
        return bool(self.requests) and (step % self.every_steps == 0 or step == last_step)

    def draw(self, step: int, sampler: Sampler, accelerator: Accelerator) -> SamplesDrawn:
        """Draw `samples/step_000100_0.png` …, shared out to the processes; the main process saves them. Returns
        their event.

        Raises StopRequestedError from the sampler; pictures drawn before are kept.
        """
        self.latest, self.latest_step = [], step
        for number, picture in enumerate(share_out(accelerator, self.requests, sampler)):
            self.latest.append(picture)
            on_main(accelerator, partial(self._save, self.path(step, number), picture))
        files = [str(self.path(step, n).relative_to(self.run_dir.path)) for n in range(len(self.requests))]
        prompts = [request.prompt for request in self.requests]
        return SamplesDrawn(step, files, prompts, [request.seed for request in self.requests])

    def draw_contexts(self, sampler: Sampler, accelerator: Accelerator) -> list[Image.Image]:
        """The contexts, shared out to the processes; fewer when a stop is requested."""
        drawn: list[Image.Image] = []
        with suppress(StopRequestedError):
            for picture in share_out(accelerator, self.contexts, sampler):
                drawn.append(picture)
        return drawn

    def path(self, step: int, number: int) -> Path:
        return self.run_dir.samples_dir / f"step_{step:06d}_{number}.png"

    def first(self, numbers: Iterable[int]) -> list[Image.Image]:
        """The pictures of step 0 for these requests, if they exist and can be read."""
        found = []
        for number in numbers:
            with suppress(UnreadableImageError, FileNotFoundError):
                found.append(to_rgb(open_image(self.path(0, number))))
        return found

    def _save(self, path: Path, picture: Image.Image) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, picture)
