"""Publication of a run: its verified adapter files, and then card, push, plot and sheet."""

import logging
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from dreambooth_moslora.base.load import get_architecture
from dreambooth_moslora.disk import events, run_folder
from dreambooth_moslora.disk.atomic import write_atomic_directory
from dreambooth_moslora.errors import StopRequestedError
from dreambooth_moslora.generation.sampling import Sampler
from dreambooth_moslora.lora import metadata, raw_file, writer
from dreambooth_moslora.lora.verify import Proof
from dreambooth_moslora.photos.synthetic import describe_synthetic
from dreambooth_moslora.pictures import draw_contact_sheet
from dreambooth_moslora.plan.distributed import run_on_main, share_work
from dreambooth_moslora.settings import prompts
from dreambooth_moslora.training.best_step import BestStep
from dreambooth_moslora.training.checkpoint import Position, resolve_settings
from dreambooth_moslora.training.contact_sheet import build_sheet_rows
from dreambooth_moslora.training.hub import push_to_hub
from dreambooth_moslora.training.model_card import CardFacts, write_card
from dreambooth_moslora.training.optimizer import get_optimizer_name
from dreambooth_moslora.training.run_plots import plot_losses
from dreambooth_moslora.training.samples import Sample, ValidationSamples
from dreambooth_moslora.training.step import TrainStep

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Publisher:
    """Publishes one run.

    run_dir: where everything goes
    train_step: the adapter, the steps that are done, the base, the photos and the settings
    samples: the images at fixed seeds
    max_train_steps: optimizer steps of the whole run
    photo_digests: of the photos and the files beside them, by name
    scores: the evaluator's latest
    best: the best step so far, if any was scored
    """

    run_dir: run_folder.RunDir
    train_step: TrainStep
    samples: ValidationSamples
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

    def publish(self, sampler: Sampler, finished: bool) -> Proof:
        """Write adapter, card, plot and sheet. Only a finished run draws contexts, with `sampler`
        in all processes, and is pushed."""
        # The adapter first: whatever fails after it, the run has its result.
        accelerator = self.train_step.accelerator
        proof = run_on_main(accelerator, lambda: self._publish_to(self.run_dir.path))

        # New contexts. A stop leaves those that are drawn.
        contexts: list[Sample] = []
        requests = self.samples.contexts if finished else []
        with suppress(StopRequestedError):
            images = share_work(accelerator, requests, sampler)
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
