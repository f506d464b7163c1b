"""One optimizer step: gradients from micro-batches, then an update of the adapter.

Every random draw has the name (seed, what, micro-batch number). Micro-batches are counted over
steps, accumulation and processes, so one process with accumulation 2 draws what two processes draw.
One all-reduce per step averages the adapters' gradients over processes. No module is wrapped, so
any part of the base can be trained. Adapters are fp32; the frozen base computes in its own dtype,
with copies of the adapter made once per step.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dreambooth_moslora.base import families
from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.base.streaming import StreamedBlocks
from dreambooth_moslora.errors import StopRequestedError, UserError, format_error, is_out_of_memory
from dreambooth_moslora.method import fast_linear, moslora
from dreambooth_moslora.plan import distributed
from dreambooth_moslora.plan.speed import choose_speed
from dreambooth_moslora.seeds import compute_seed, seed_generator, seed_rng
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import adapters, dataset, objective, prepare
from dreambooth_moslora.training.checkpoint import restore_optimizer, restore_weights
from dreambooth_moslora.training.compilation import compile_blocks
from dreambooth_moslora.training.micro_batch import (
    DenoiserInputs,
    MicroBatch,
    collect_same_size,
    forward_together,
)
from dreambooth_moslora.training.optimizer import (
    build_average,
    build_parameter_groups,
    make_lr_schedule,
    make_optimizer,
    use_averaged_weights,
)

logger = logging.getLogger(__name__)

FALLBACK_NOTE = "the run goes on without"
PX_PER_TOKEN = 16 * 16
"""Of a picture, in the transformers whose scheduler shifts levels by the number of tokens."""


@dataclass(frozen=True)
class StepLosses:
    """Losses, as means over a step's micro-batches and processes, and the gradient's norm before
    clipping. `prior` is None for a step without one."""

    total: float
    instance: float
    prior: float | None
    grad_norm: float


class TrainStep:
    """The adapter, its optimizer, and the steps done.

    config: the run's settings
    inputs: the base, the photos and the texts; the adapter is added to the base in place
    accelerator: the processes, and the precision
    max_train_steps: optimizer steps of the whole run
    checkpoint: a folder to go on from; None for a fresh adapter
    step: the optimizer steps that are done

    Raises UserError for a checkpoint of other layers, and for an optimizer whose package is
    missing.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: prepare.TrainInputs,
        accelerator: Accelerator,
        max_train_steps: int,
        checkpoint: Path | None = None,
        step: int = 0,
    ):
        self.config = config
        self.inputs = inputs
        self.accelerator = accelerator
        self.device = accelerator.device
        self.step = step
        self.schedule = inputs.schedule.to(self.device)
        self.class_prompts = [subject.class_prompt for subject in config.each_subject]

        # What repays its preparation in the steps that are left.
        speed = choose_speed(config, self.device.type, max_train_steps - step)
        if speed.has_cudnn_search:
            torch.backends.cudnn.benchmark = True

        # The adapter, in the layers of the base. Its start is freed, as the layers hold copies.
        self.components = adapters.get_trained_modules(config, inputs.family.facts, inputs.pipeline)
        adapters.add_adapters(config, self.components, checkpoint, start=inputs.initial_weights)
        inputs.initial_weights = None
        self.compiled_blocks: list[torch.nn.Module] = []
        if speed.is_compiled:
            self.compiled_blocks = compile_blocks(inputs.denoiser)
            if accelerator.is_main_process:
                logger.warning("%s", speed.describe())

        # Its weights. The steps compute with copies in the base's dtype.
        self.parameters: list[torch.nn.Parameter] = []
        self.lora_layers: list[torch.nn.Module] = []
        for module in self.components.values():
            self.parameters += [weight for _, weight in moslora.list_adapter_parameters(module)]
            self.lora_layers += moslora.list_lora_layers(module)
        self.working_copies = fast_linear.WorkingCopies(*self.components.values())

        # What updates them, where the checkpoint left it.
        groups = build_parameter_groups(config, self.components, accelerator.num_processes)
        optimizer = make_optimizer(config, groups)
        self.lr_schedule = make_lr_schedule(config, optimizer, max_train_steps)
        if checkpoint is not None:
            restore_optimizer(
                checkpoint,
                step=step,
                optimizer=optimizer,
                schedule=self.lr_schedule,
                scaler=accelerator.scaler,
            )

        # The checkpoint's adapter is the average, if there is one. So the average is copied before
        # the weights that go on are put back.
        self.average = build_average(config, self.parameters, optimizer)
        if checkpoint is not None and self.average is not None:
            restore_weights(checkpoint, self.parameters)
        self.optimizer = accelerator.prepare(optimizer)

    def accumulate_gradients(self) -> torch.Tensor:
        """Draw, predict, compare and differentiate this process's micro-batches; again without
        compilation if that fails. Returns total, instance and prior loss (3,) of the step, on the
        device: reading them would wait for it."""
        try:
            return self.run_micro_batches()
        except (UserError, StopRequestedError):
            raise
        except Exception as error:  # compilers and what they call raise what they like
            if is_out_of_memory(error) or not self.compiled_blocks:
                raise
            self.stop_compiling(format_error(f"{type(error).__name__} {error}", 200))

        # The draws have names, so the second attempt sees the same.
        return self.run_micro_batches()

    def run_micro_batches(self) -> torch.Tensor:
        """The same, once."""
        self.begin_step()
        found = []
        turns = range(self.config.gradient_accumulation_steps)
        with self.working_copies.attach_copies() as copies:
            # Draw: what passes through the denoiser together.
            for micros, share in self.iterate_chunks(map(self.compute_micro_batch_number, turns)):
                # Predict, compare, differentiate.
                found += self.backward_chunk(micros, share)
                copies.collect()
        return self.reduce_losses(found)

    def backward_chunk(
        self, micros: Sequence[MicroBatch], share: float | None
    ) -> list[torch.Tensor]:
        """One pass forward and backward. Returns total, instance and prior loss (3,) of each
        micro-batch; gradients are added to the copies'."""
        losses = self.compute_losses(micros, share)
        total = sum((parts.total for parts in losses[1:]), losses[0].total)
        self.accelerator.backward(total / self.config.gradient_accumulation_steps)
        found = []
        for parts in losses:
            found.append(torch.stack([parts.total.detach(), parts.instance, parts.prior]))
        return found

    def compute_losses(
        self, micros: Sequence[MicroBatch], share: float | None = None
    ) -> list[objective.LossParts]:
        """The loss of each of these, which pass through the denoiser together. `share` is that of a
        part of a micro-batch, whose parts sum to its loss."""
        # Predict. The frozen base's answer is the target of the prior's pictures.
        answers: list[torch.Tensor | None] = [None] * len(micros)
        if self.is_base_prior:
            prior = [self.build_prior_inputs(micro) for micro in micros]
            answers = forward_together(self.forward_base, prior)
        predictions = forward_together(self.predict, [micro.inputs for micro in micros])

        # Compare.
        found = []
        for micro, prediction, answer in zip(micros, predictions, answers, strict=True):
            parts = self.compute_loss(micro, prediction, answer)
            found.append(parts if share is None else parts.share(share))
        return found

    def compute_loss(
        self, micro: MicroBatch, prediction: torch.Tensor, answer: torch.Tensor | None
    ) -> objective.LossParts:
        """The loss of `prediction` (B, C, h, w). `answer` (B/2, C, h, w) is the base's, the target
        of the prior's half."""
        config, schedule = self.config, self.schedule
        index = micro.inputs.noisy_sample.timestep_indices

        # The target of the prior's half is the base's answer, if the base is the prior.
        target = micro.target
        if answer is not None:
            target = torch.cat([target[: micro.instance_count], answer])

        # What an error weighs at its noise level.
        weights = objective.compute_weights(
            config,
            schedule,
            index,
            instance_count=micro.instance_count,
        )

        return objective.compute_loss(
            prediction,
            target,
            weights,
            instance_count=micro.instance_count,
            prior_loss_weight=config.prior_loss_weight,
            mask=micro.mask,
        )

    def iterate_chunks(
        self, numbers: Iterable[int]
    ) -> Iterator[tuple[list[MicroBatch], float | None]]:
        """What passes together through the denoiser of the micro-batches of these numbers, one
        after the other: whole micro-batches, or a part of one with its share."""
        most, whole = self.config.images_per_pass, self.config.images_per_micro_batch
        micros = map(self.build_micro_batch, numbers)
        if most >= whole:
            for together in collect_same_size(micros, most // whole):
                yield together, None
        else:
            for micro in micros:
                for part, share in micro.split_chunks(most):
                    yield [part], share

    def stop_compiling(self, reason: str) -> None:
        """Go on with the blocks as they were, and say why."""
        for block in self.compiled_blocks:
            block._compiled_call_impl = None
        self.compiled_blocks = []
        logger.warning("--compile: %s: %s", FALLBACK_NOTE, reason)

    def apply_settings(self, config: TrainConfig) -> None:
        """Take settings that differ from the present ones in what `memory_plans.leaner` changes."""
        inputs = self.inputs

        # The base, and what the layers keep for the backward pass.
        if config.base_quantization != self.config.base_quantization:
            quantize(inputs.denoiser, config.base_quantization, inputs.dtype, self.device)
        for module in self.components.values():
            adapters.apply_gradient_checkpointing(config, module)

        if config.stream_blocks and not self.config.stream_blocks:
            StreamedBlocks(inputs.denoiser, self.device)

        # The copies know the layers' weights, and what a step that broke off has left.
        self.config = config
        self.working_copies = fast_linear.WorkingCopies(*self.components.values())

    def begin_step(self) -> None:
        """Before a step: dropout is on, and no gradients are left."""
        for module in self.components.values():
            if not module.training:  # as `train()` walks over thousands of modules
                module.train()
        self.optimizer.zero_grad(set_to_none=True)

    def compute_micro_batch_number(self, turn: int) -> int:
        """The number of this process's micro-batch within the run; `turn` counts the
        accumulation."""
        count, world = self.config.gradient_accumulation_steps, self.accelerator.num_processes
        return (self.step * count + turn) * world + self.accelerator.process_index

    def update_adapter(self, losses: torch.Tensor) -> StepLosses:
        """Average and clip gradients, and take a step. `losses` (3,) are those of
        `accumulate_gradients`. If the norm is not finite, fp16 has skipped the step."""
        self._average_gradients()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()

        # Reading waits for a GPU, so it is done once, after all is queued.
        total, instance, prior, norm = torch.cat([losses, norm.view(1)]).tolist()

        # A step that fp16 skipped did not happen: it has neither a rate nor a number.
        if math.isfinite(norm):
            self.lr_schedule.step()
            self.step += 1
        return StepLosses(
            total=total,
            instance=instance,
            prior=prior if self.config.with_prior_preservation else None,
            grad_norm=norm,
        )

    @contextmanager
    def apply_average(self) -> Iterator[None]:
        """The adapter holds its average, as it is published, scored and sampled, for the length of
        the block."""
        # Pictures would need graphs of their own.
        pause = torch.compiler.set_stance("force_eager") if self.compiled_blocks else nullcontext()
        with pause, use_averaged_weights(self.average, self.parameters):
            yield

    def build_micro_batch(self, number: int) -> MicroBatch:
        """The run's micro-batch of this number: drawn on the CPU with noise and noise levels, then
        moved to the device."""
        config = self.config
        batch = self.build_train_batch(number)
        names = (config.seed, "micro", number)
        torch.manual_seed(compute_seed(*names, "dropout"))

        # Noise and noise levels, the same whatever the device.
        noise = torch.randn(batch.latents.shape, generator=seed_generator(*names, "noise"))
        offset = seed_generator(*names, "noise offset")
        drawn = {
            "latents": batch.latents,
            "time_ids": batch.time_ids,
            "mask": batch.mask,
            "noise": objective.add_noise_offset(noise, config.noise_offset, offset),
            "index": self.sample_timesteps(batch, seed_generator(*names, "level")),
        }

        # Texts of frozen encoders move with the rest; others are computed on the device.
        if config.train_text_encoder:
            moved = dataset.move_tensors(drawn, self.device)
            texts = self.encode_prompts(batch.prompts)
        else:
            cached = self.inputs.text_cache(batch.prompts)
            for place, text in enumerate(cached):
                drawn |= {(place, name): tensor for name, tensor in text.items()}
            moved = dataset.move_tensors(drawn, self.device)
            texts = []
            for place, text in enumerate(cached):
                texts.append({name: moved[place, name] for name in text})

        # The noised latents, and what the denoiser should answer.
        latents, noise, index = moved["latents"], moved["noise"], moved["index"]
        return MicroBatch(
            inputs=DenoiserInputs(
                noisy_sample=objective.add_noise(self.schedule, latents, noise, index),
                text_embeddings=tuple(texts),
                time_ids=moved["time_ids"],
                prompts=tuple(batch.prompts),
            ),
            target=objective.compute_target(self.schedule, latents, noise, index),
            mask=moved["mask"],
            instance_count=batch.instance_count,
        )

    def sample_timesteps(self, batch: dataset.TrainBatch, draws: torch.Generator) -> torch.Tensor:
        """Indices (B,) into the schedule, as the settings draw them."""
        config, schedule = self.config, self.inputs.schedule
        count = len(batch.latents)
        if schedule.style != "flow":
            return torch.randint(len(schedule), (count,), generator=draws)

        # A larger picture has more tokens, so its levels shift towards noise.
        tokens = None
        if config.shift_timesteps:
            tokens = batch.time_ids[:, 4:].prod(1) / PX_PER_TOKEN
        return objective.sample_flow_timesteps(
            schedule,
            count,
            draws,
            scheme=config.weighting_scheme or "none",
            mean=config.logit_mean,
            std=config.logit_std,
            mode=config.mode_scale,
            tokens=tokens,
        )

    def build_train_batch(self, micro_batch: int) -> dataset.TrainBatch:
        """Micro-batch number `build_micro_batch` of the run, with its prior half if the run has
        one."""
        size = self.config.train_batch_size
        positions = range(micro_batch * size, (micro_batch + 1) * size)
        batch = self.inputs.collate_batch(positions)
        if not self.is_base_prior:
            return batch

        # The base's own answer is the prior: the same pictures, with prompts of their class.
        subjects = map(self.inputs.instance_dataset.get_subject, positions)
        classes = [self.class_prompts[subject] for subject in subjects]
        return batch.add_base_prior(sample_prior_prompts(self.config, classes, micro_batch))

    def predict(self, rows: DenoiserInputs) -> torch.Tensor:
        """The denoiser's prediction (B, C, h, w) in fp32. `time_ids` stay fp32: bf16 makes 1365 px
        1368."""
        inputs, noisy = self.inputs, rows.noisy_sample
        to = {"device": self.device, "dtype": inputs.dtype}
        words = inputs.family.collate(
            [families.cast_embedding(text, **to) for text in rows.text_embeddings]
        )
        output = inputs.family.predict(
            inputs.denoiser, noisy.denoiser_input.to(**to), noisy.timesteps, rows.time_ids, **words
        )
        return objective.convert_prediction(self.schedule, output.float(), noisy)

    def build_prior_inputs(self, micro: MicroBatch) -> DenoiserInputs:
        """The rows of the prior half, with text embeddings of the untrained encoders."""
        rows = micro.inputs[micro.instance_count :]
        if self.config.train_text_encoder:
            return replace(rows, text_embeddings=tuple(self.inputs.text_cache(list(rows.prompts))))
        return rows

    @torch.no_grad()
    def forward_base(self, rows: DenoiserInputs) -> torch.Tensor:
        """The frozen base's prediction (B/2, C, h, w) for the prior half, which is that half's
        target."""
        with moslora.disable_layers(self.lora_layers):
            return self.predict(rows)

    def encode_prompts(self, prompts: list[str]) -> list[families.TextEmbedding]:
        """Cached texts, or live ones with gradients when the text encoders are trained."""
        if self.config.train_text_encoder:
            return self.inputs.family.encode_prompts(self.inputs.pipeline, prompts)
        return self.inputs.text_cache(prompts)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the denoiser's A and B in the next step, with Prodigy's own estimate."""
        group = self.optimizer.param_groups[0]
        return group["lr"] * group.get("d", 1.0)

    @property
    def is_base_prior(self) -> bool:
        return self.config.with_prior_preservation and self.config.prior == "adapter_off"

    def _average_gradients(self) -> None:
        """Over the processes, in one all-reduce."""
        if self.accelerator.num_processes == 1:
            return
        grads = [p.grad for p in self.parameters if p.grad is not None]
        mean = distributed.reduce_mean(self.accelerator, parameters_to_vector(grads))
        vector_to_parameters(mean, grads)

    def reduce_losses(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Means (3,) over the step's micro-batches and all processes. `found` are the losses (3,)
        of each, or of its parts, which sum to them."""
        count = self.config.gradient_accumulation_steps
        of_all = torch.stack(losses).sum(0) / count
        return distributed.reduce_mean(self.accelerator, of_all)


def sample_prior_prompts(config: TrainConfig, classes: list[str], micro_batch: int) -> list[str]:
    """For each photo the prompt of its class, or with equal chance a random one of
    `sample_prior_prompts`."""
    draws = seed_rng(config.seed, "micro", micro_batch, "prior prompts")
    found = []
    for of_class in classes:
        other = draws.choice(config.prior_prompts or (of_class,))
        found.append(draws.choice((of_class, other)))
    return found
