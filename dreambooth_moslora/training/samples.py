"""Samples of a run: images of the same prompts and noise at step 0, during the run and at the end.

At the end new contexts are added: the subject where no photo shows it. The images of step 0 are
read from the run folder, so that a resumed run has them as well.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from dreambooth_moslora.disk import events, run_folder
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from dreambooth_moslora.photos.photo_file import (
    UnreadableImageError,
    open_image,
    to_rgb,
)
from dreambooth_moslora.pictures import write_png
from dreambooth_moslora.plan.distributed import run_on_main, share_work
from dreambooth_moslora.seeds import compute_seed
from dreambooth_moslora.settings import prompts, train_config

Sample = tuple[SampleRequest, Image.Image]
"""What was asked for, and the image that was drawn."""


@dataclass
class ValidationSamples:
    """Samples of a run.

    run_dir: where they are saved
    requests: drawn at each sampling step
    contexts: drawn once at the end
    every_steps: optimizer steps from one drawing to the next
    latest: the images of `latest_step`, in the order of the requests
    """

    run_dir: run_folder.RunDir
    requests: list[SampleRequest]
    contexts: list[SampleRequest]
    every_steps: int
    latest: list[Image.Image] = field(default_factory=list)
    latest_step: int = 0

    @classmethod
    def from_config(
        cls, config: train_config.TrainConfig, run_dir: run_folder.RunDir, steps_per_epoch: int
    ) -> "ValidationSamples":
        """Build the samples that the settings ask for."""
        numbers = range(config.sample_count)
        seeds = [compute_seed(config.seed, "sample", number) % 2**32 for number in numbers]
        validation_prompts = prompts.list_validation_prompts(config)
        requests = [SampleRequest(prompt, seed) for prompt in validation_prompts for seed in seeds]

        # New contexts are drawn for a run that draws samples, once each.
        context_prompts = prompts.list_context_prompts(config) if requests else []
        contexts = [SampleRequest(prompt, seeds[0]) for prompt in context_prompts]
        return cls(
            run_dir=run_dir,
            requests=requests,
            contexts=contexts,
            every_steps=config.validation_steps or config.validation_epochs * steps_per_epoch,
        )

    @property
    def prompts(self) -> list[str]:
        """Every prompt that may be drawn, sorted."""
        return sorted({request.prompt for request in [*self.requests, *self.contexts]})

    def should_sample(self, step: int, last_step: int) -> bool:
        return bool(self.requests) and (step % self.every_steps == 0 or step == last_step)

    def sample_images(
        self, step: int, sampler: Sampler, accelerator: Accelerator
    ) -> events.SamplesSaved:
        """Draw `samples/step_000100_0.png` …, shared out; the main process saves. Raises
        StopRequestedError."""
        self.latest, self.latest_step = [], step
        for number, image in enumerate(share_work(accelerator, self.requests, sampler)):
            self.latest.append(image)
            run_on_main(accelerator, partial(self.save, self.get_path(step, number), image))
        paths = [self.get_path(step, number) for number in range(len(self.requests))]
        return events.SamplesSaved(
            step=step,
            files=[str(path.relative_to(self.run_dir.path)) for path in paths],
            prompts=[request.prompt for request in self.requests],
            seeds=[request.seed for request in self.requests],
        )

    def get_path(self, step: int, number: int) -> Path:
        """Return the path of the sample of request `number` at that step."""
        return self.run_dir.samples_dir / f"step_{step:06d}_{number}.png"

    def load_first_samples(self, requests: Iterable[SampleRequest]) -> list[Sample]:
        """Load the images of step 0 of these requests that exist and can be read; a resumed run may
        have others."""
        # Which requests were drawn at step 0, and under which number.
        records = self.run_dir.read_events(events.SamplesSaved.kind)
        numbers: dict[SampleRequest, int] = {}
        for event in events.filter_events(events.SamplesSaved, records):
            if event.step == 0:
                for number, (prompt, seed) in enumerate(zip(event.prompts, event.seeds)):
                    numbers[SampleRequest(prompt, seed)] = number

        # Their images, in the order that is asked for.
        images = []
        for request in requests:
            if request in numbers:
                with suppress(UnreadableImageError, FileNotFoundError):
                    image = open_image(self.get_path(0, numbers[request]))
                    images.append((request, to_rgb(image)))
        return images

    def save(self, path: Path, image: Image.Image) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, image)
