"""Results of a run: samples, verified adapter files, card, sheets, plots, and the push to the hub.

Samples have the same prompts and noise at step 0, during the run and at the end. At the end it also
draws new contexts: the subject where no photo shows it. The images of step 0 are read from the
run folder, so that a resumed run has them as well.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dreambooth_moslora.base.load import get_architecture
from dreambooth_moslora.disk import events, run_folder
from dreambooth_moslora.disk.atomic import write_atomic, write_atomic_directory
from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.errors import StopRequestedError, UserError
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from dreambooth_moslora.lora import metadata, raw_file, writer
from dreambooth_moslora.lora.verify import Proof
from dreambooth_moslora.photos.photo_file import (
    Photo,
    UnreadableImageError,
    open_image,
    open_rgb,
    to_rgb,
)
from dreambooth_moslora.photos.synthetic import describe_synthetic
from dreambooth_moslora.pictures import SheetRow, draw_contact_sheet, write_png
from dreambooth_moslora.plan.distributed import run_on_main, share_work
from dreambooth_moslora.seeds import compute_seed
from dreambooth_moslora.settings import metric_kinds, prompts, train_config
from dreambooth_moslora.training.best_step import BestStep
from dreambooth_moslora.training.checkpoint import Position, resolve_settings
from dreambooth_moslora.training.model_card import CardFacts, push_to_hub, render_model_card
from dreambooth_moslora.training.optimizer import get_optimizer_name
from dreambooth_moslora.training.step import TrainStep

logger = logging.getLogger(__name__)

LOSS_CURVES = {"loss_instance": ("#2a6fdb", "instance"), "loss_prior": ("#d9822b", "prior")}
"""Losses with their colour and label."""
MAX_CARD_IMAGES = 6
"""Pictures on a card, but for at least two samples."""

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
        seeds = []
        for number in range(config.sample_count):
            seeds.append(compute_seed(config.seed, "sample", number) % 2**32)
        validation_prompts = prompts.list_validation_prompts(config)
        requests = [SampleRequest(prompt, seed) for prompt in validation_prompts for seed in seeds]

        # New contexts are drawn for a run that draws samples, once each.
        contexts = []
        if requests:
            for prompt in prompts.list_context_prompts(config):
                contexts.append(SampleRequest(prompt, seeds[0]))
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
        files = []
        for number in range(len(self.requests)):
            files.append(str(self.get_path(step, number).relative_to(self.run_dir.path)))
        return events.SamplesSaved(
            step=step,
            files=files,
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


def compute_running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each position (fewer at the start); same length as
    `values`."""
    ends = np.arange(1, len(values) + 1)
    return np.array([values[max(0, end - window) : end].mean() for end in ends])


def plot_losses(
    steps: Sequence[events.StepDone], path: Path, evaluations: Sequence[events.StepEvaluated] = ()
) -> None:
    """Write a PNG with the loss and its running mean, and with the scores if there are
    evaluations."""
    panels = 2 if evaluations else 1
    figure = Figure(figsize=(7, 3.5 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]

    # The losses. Single steps vary so much that only the mean shows where they go.
    for key, (colour, label) in LOSS_CURVES.items():
        logged = [event for event in steps if getattr(event, key) is not None]
        if not logged:
            continue
        at = np.array([event.step for event in logged])
        values = np.array([getattr(event, key) for event in logged])
        mean = compute_running_mean(values, max(5, len(values) // 20))
        axes[0].plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
        axes[0].plot(at, mean, color=colour, label=label)
    axes[0].set(xlabel="step", ylabel="loss", ylim=(0, None))
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend(frameon=False)

    # The scores below them.
    if evaluations:
        plot_scores(axes[1], evaluations)
    for panel in axes:
        panel.grid(alpha=0.3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())


def plot_scores(axes: Axes, evaluations: Sequence[events.StepEvaluated]) -> None:
    """Draw likeness, prompt, copies and score; a line marks the best step."""
    at = [event.step for event in evaluations]
    for key, label in metric_kinds.get_curve_labels().items():
        values = [event.scores.get(key, np.nan) for event in evaluations]
        if np.isfinite(values).any():
            # Without copies, the score may be the subject's likeness: it lies wide beneath.
            style = {"linewidth": 6, "alpha": 0.4, "zorder": 1} if key == "score" else {}
            axes.plot(at, values, "o-", **{"markersize": 3, "linewidth": 1} | style, label=label)
    if best := evaluations[-1].best:
        label = f"best: step {best['step']}"
        axes.axvline(best["step"], color="#888", linestyle=":", label=label)
    axes.set(xlabel="step", ylabel="score")
    # Below the curves, which would hide it.
    beneath = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 3}
    axes.legend(frameon=False, fontsize="small", **beneath)


@dataclass(eq=False)
class Publisher:
    """Publishes one run.

    run_dir: where everything goes
    train_step: the adapter, the steps that are done, the base, the photos and the settings
    samples: the images at fixed seeds
    sampler: draws new contexts at the end
    max_train_steps: optimizer steps of the whole run
    photo_digests: of the photos and the files beside them, by name
    scores: the evaluator's latest
    best: the best step so far, if any was scored
    """

    run_dir: run_folder.RunDir
    train_step: TrainStep
    samples: ValidationSamples
    sampler: Sampler
    max_train_steps: int
    photo_digests: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    best: BestStep | None = None

    @property
    def position(self) -> Position:
        """Facts of the run for a checkpoint."""
        config = self.train_step.config
        return Position(
            step=self.train_step.step,
            seed=config.seed,
            optimizer=get_optimizer_name(config),
            base=self.train_step.inputs.base_identity,
            settings=resolve_settings(config),
            photos=self.photo_digests,
        )

    @property
    def facts(self) -> metadata.AdapterMetadata:
        """Facts for the headers of the run's files; with the step, unless it is the last."""
        step = self.train_step.step
        facts = collect_facts(self.train_step)
        return replace(facts, step=None if step == self.max_train_steps else step)

    def keep_best(self) -> None:
        """Write the current adapter to `best/`, loadable like the final one, completely or not at
        all."""
        with write_atomic_directory(self.run_dir.best_dir) as folder:
            self._publish_to(folder)

    def publish(self, finished: bool) -> Proof:
        """Write adapter, card, plot and sheet. Only a finished run draws contexts and is pushed;
        all processes draw."""
        # The adapter first: whatever fails after it, the run has its result.
        accelerator = self.train_step.accelerator
        proof = run_on_main(accelerator, lambda: self._publish_to(self.run_dir.path))

        # New contexts. A stop leaves those that are drawn.
        contexts: list[Sample] = []
        requests = self.samples.contexts if finished else []
        with suppress(StopRequestedError):
            images = share_work(accelerator, requests, self.sampler)
            for image, request in zip(images, requests, strict=True):
                contexts.append((request, image))

        run_on_main(accelerator, lambda: self._write_card_and_plots(finished, proof, contexts))
        return proof

    def _write_card_and_plots(self, finished: bool, proof: Proof, contexts: list[Sample]) -> None:
        """Write the card, push, and draw the plot and the sheet, which are not pushed."""
        config, run_dir = self.train_step.config, self.run_dir
        photos = self.train_step.inputs.photos
        facts = CardFacts(
            name=run_dir.name,
            step=self.train_step.step,
            max_train_steps=self.max_train_steps,
            adapter=self.facts,
            proof=proof,
            scores=self.scores,
            best=self.best if run_dir.best_dir.is_dir() else None,
            synthetic_lines=tuple(describe_synthetic(photos, config.synthetic_weight)),
        )
        latest_samples = list(zip(self.samples.requests, self.samples.latest))
        write_card(config, run_dir, facts, latest_samples, contexts)
        try:
            if finished and config.push_to_hub:
                push_to_hub(run_dir.path, config.hub_model_id, config.hub_token)
        finally:
            # What stays here is drawn whatever the hub does.
            steps = events.filter_events(events.StepDone, run_dir.read_events(events.StepDone.kind))
            if steps:
                plot_losses(steps, run_dir.loss_plot_path, run_dir.read_scores())
            if latest_samples:
                rows = build_sheet_rows(config, photos, self.samples, contexts)
                draw_contact_sheet(rows, run_dir.contact_sheet_path)

    def _publish_to(self, folder: Path) -> Proof:
        """Write the adapter's files, each proved to reload."""
        components = self.train_step.components
        return writer.publish(components, folder, self.run_dir.name, self.facts)


def collect_facts(train_step: TrainStep) -> metadata.AdapterMetadata:
    """Collect the facts for the headers of the run's files: adapter, base, and recipe."""
    config = train_step.config
    facts = raw_file.build_adapter_metadata(
        train_step.components,
        base_id=config.pretrained_model_name_or_path,
        base_architecture=get_architecture(train_step.inputs.denoiser),
        trigger_words=prompts.list_trigger_words(config),
        class_word=prompts.get_class_word(config),
        resolution_px=config.resolution,
    )

    # Said only where it differs from the usual run: one subject, one process.
    bare: tuple[str, ...] = ()
    if len(config.subjects) > 1:
        bare = tuple(subject.instance_prompt for subject in config.each_subject)
    accelerator = train_step.accelerator
    processes = accelerator.num_processes if accelerator.num_processes > 1 else None
    facts = replace(facts, subject_prompts=bare, processes=processes)

    # The precision may come from `accelerate config`.
    if accelerator.mixed_precision != "no":
        config = replace(config, mixed_precision=accelerator.mixed_precision)
    return metadata.add_recipe(config, facts)


def write_card(
    config: train_config.TrainConfig,
    run_dir: run_folder.RunDir,
    facts: CardFacts,
    samples: list[Sample],
    contexts: list[Sample],
) -> None:
    """Write README.md and its images. Old images go first: at all times a card names every
    image.

    config: the run's settings
    run_dir: where they are written
    facts: what the card says
    samples: the samples at the end
    contexts: the new contexts
    """
    images = pick_card_images(config, samples, contexts)
    for stale in run_folder.list_card_pictures(run_dir.read_card() or ""):
        (run_dir.path / stale).unlink(missing_ok=True)

    # The card names its images before they are there.
    names = []
    for number, (request, _) in enumerate(images):
        names.append((f"image_{number}.png", request.prompt))
    write_atomic(run_dir.card_path, render_model_card(config, replace(facts, images=tuple(names))))
    for (name, _), (_, image) in zip(names, images):
        write_png(run_dir.path / name, image)


def pick_card_images(
    config: train_config.TrainConfig, samples: list[Sample], contexts: list[Sample]
) -> list[Sample]:
    """Pick the card's images: samples and new contexts; of several subjects the first sample of
    each prompt, then pairs."""
    if len(config.subjects) <= 1:
        return [*samples[: max(2, MAX_CARD_IMAGES - len(contexts))], *contexts]
    first_of_each = {request.prompt: (request, image) for request, image in reversed(samples)}
    pairs = prompts.list_pair_prompts(config)
    together = [sample for sample in contexts if sample[0].prompt in pairs]
    return [*reversed(first_of_each.values()), *together]


def build_sheet_rows(
    config: train_config.TrainConfig,
    photos: list[Photo],
    samples: ValidationSamples,
    contexts: list[Sample],
) -> list[SheetRow]:
    """Each subject's photos, its images of step 0 and the end, new contexts; then pairs. It is
    never uploaded."""
    start = f"adapter {get_public_name(config.init_adapter)}" if config.init_adapter else "base"
    latest = list(zip(samples.requests, samples.latest)) if samples.latest_step else []
    rows = []

    # Each subject from top to bottom: what it is, what the base made of it, what the adapter does.
    for number, subject in enumerate(config.each_subject):
        subject_photos = [photo for photo in photos if photo.subject == number]
        name = f" of “{subject.instance_prompt}”" if config.subjects else ""
        subject_prompts = prompts.list_validation_prompts(subject)
        requests = [request for request in samples.requests if request.prompt in subject_prompts]
        at_end = f"Step {samples.latest_step}: the same prompts, from the same noise"
        in_context = filter_samples(contexts, prompts.list_context_prompts(subject))
        rows += [
            SheetRow(f"The photos{name}", open_readable_photos(subject_photos[:6])),
            build_row(
                f"Step 0: the {start}, before training", samples.load_first_samples(requests)
            ),
            build_row(at_end, filter_samples(latest, subject_prompts)),
            build_row("New contexts", in_context),
        ]

    # Pairs stand below all, as they are of two subjects.
    pairs = prompts.list_pair_prompts(config)
    return [*rows, build_row("Two subjects in one prompt", filter_samples(contexts, pairs))]


def filter_samples(samples: list[Sample], wanted_prompts: Sequence[str]) -> list[Sample]:
    """Return the samples of the `wanted_prompts`."""
    return [(request, image) for request, image in samples if request.prompt in wanted_prompts]


def build_row(title: str, samples: list[Sample]) -> SheetRow:
    """Return a row with the prompts as captions."""
    return SheetRow(
        title=title,
        images=[image for _, image in samples],
        captions=tuple(request.prompt for request, _ in samples),
    )


def open_readable_photos(photos: list[Photo]) -> list[Image.Image]:
    """Open the photos that can be read now; the run may have begun long ago."""
    images = []
    for photo in photos:
        try:
            images.append(open_rgb(photo))
        except UserError as error:
            logger.warning("the contact sheet is without a photo: %s", error)
    return images
