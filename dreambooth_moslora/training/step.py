"""Optimizer step: gradients of micro-batches, then an update of the adapter.

Random draws are seeded by name: (seed, name, micro-batch number). Micro-batches are numbered over
steps, accumulation and processes, so one process with accumulation 2 draws what two processes draw.
One all-reduce per step averages the adapters' gradients over processes. No module is wrapped, so
any part of the base can be trained. Adapters are fp32; the frozen base computes in its own dtype,
with copies of the adapter made once per step.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dreambooth_moslora.base import devices, families
from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.base.streaming import StreamedBlocks
from dreambooth_moslora.errors import StopRequestedError, UserError, format_error, is_out_of_memory
from dreambooth_moslora.method import fast_linear, moslora
from dreambooth_moslora.plan import distributed, memory_plans
from dreambooth_moslora.plan.speed import choose_speed
from dreambooth_moslora.seeds import compute_seed, seed_generator, seed_rng
from dreambooth_moslora.settings.family_facts import PX_PER_TOKEN
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import adapters, dataset, objective, prepare
from dreambooth_moslora.training.checkpoint import restore_optimizer, restore_weights
from dreambooth_moslora.training.compilation import compile_blocks
from dreambooth_moslora.training.gradient_checkpointing import apply_gradient_checkpointing
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
"""End of the warning about compilation that failed."""


@dataclass(frozen=True)
class StepLosses:
    """Mean losses of a step over its micro-batches and processes, and the gradient norm before
    clipping. `prior` is None for a run without prior preservation."""

    total: float
    instance: float
    prior: float | None
    grad_norm: float


class TrainStep:
    """Adapter, optimizer and the count of steps done.

    config: the run's settings
    inputs: base, data loader and text embeddings; the adapter is added to the base in place
    accelerator: processes and precision
    max_train_steps: optimizer steps of the whole run
    checkpoint: folder to resume from; None for a fresh adapter
    step: optimizer steps done
    on_new_settings: gets the settings if a first step without memory changes them

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
        on_new_settings: Callable[[TrainConfig], object] = bool,
    ):
        self.config = config
        self.on_new_settings = on_new_settings
        self.inputs = inputs
        self.accelerator = accelerator
        self.device = accelerator.device
        self.step = step
        self.schedule = inputs.schedule.to(self.device)
        self.class_prompts = [subject.class_prompt for subject in config.each_subject]

        # Compilation and cuDNN's search, if the remaining steps repay them.
        speed = choose_speed(config, self.device.type, max_train_steps - step)
        if speed.has_cudnn_search:
            torch.backends.cudnn.benchmark = True

        # The adapter, in the layers of the base. Its initial weights are freed: layers hold copies.
        self.components = adapters.get_trained_modules(config, inputs.family.facts, inputs.pipeline)
        adapters.add_adapters(config, self.components, checkpoint, start=inputs.initial_weights)
        inputs.initial_weights = None
        self.compiled_blocks: list[torch.nn.Module] = []
        if speed.is_compiled:
            self.compiled_blocks = compile_blocks(inputs.denoiser)
            if accelerator.is_main_process:
                logger.warning("%s", speed.describe())

        # Trained parameters. Steps compute with copies of them in the base's dtype.
        self.parameters: list[torch.nn.Parameter] = []
        self.lora_layers: list[torch.nn.Module] = []
        for module in self.components.values():
            self.parameters += [weight for _, weight in moslora.list_adapter_parameters(module)]
            self.lora_layers += moslora.list_lora_layers(module)
        self.working_copies = fast_linear.WorkingCopies(*self.components.values())

        # Optimizer and schedule, as the checkpoint left them.
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

        # A checkpoint's adapter file holds the average, if there is one. The average is copied from
        # it before the unaveraged weights are restored.
        self.average = build_average(config, self.parameters, optimizer)
        if checkpoint is not None and self.average is not None:
            restore_weights(checkpoint, self.parameters)
        self.optimizer = accelerator.prepare(optimizer)

    def accumulate_gradients(self) -> torch.Tensor:
        """Compute the gradients of a step. One that fails is repeated while a fallback is left.

        Returns total, instance and prior loss (3,) of the step, on the device: reading them would
        wait for it.
        """
        while True:
            try:
                return self.run_micro_batches()
            except (UserError, StopRequestedError):
                raise
            except Exception as error:  # compilers and what they call raise what they like
                fall_back = self.find_fallback(error)
                if fall_back is None:
                    raise

            # Outside the except block, where the error no longer holds the step's tensors. Random
            # draws are seeded by name, so the next attempt has the same.
            fall_back()

    def find_fallback(self, error: Exception) -> Callable[[], None] | None:
        """Return what must be called before a failed step is repeated; None if it must end the run.

        Without memory, a step is repeated before the first update alone, and not by one of several
        processes, as the others would not know.
        """
        if not is_out_of_memory(error):
            reason = format_error(f"{type(error).__name__} {error}", 200)
            return partial(self.stop_compiling, reason) if self.compiled_blocks else None
        if self.step > 0 or self.accelerator.num_processes > 1:
            return None
        leaner = memory_plans.find_leaner_settings(self.config, self.inputs.family.facts)
        return partial(self.apply_settings, *leaner) if leaner else None

    def run_micro_batches(self) -> torch.Tensor:
        """Run every micro-batch of the step forward and backward, without a fallback. Returns as
        `accumulate_gradients`."""
        self.begin_step()
        losses = []
        turns = range(self.config.gradient_accumulation_steps)
        with self.working_copies.attach_copies() as copies:
            # Load what passes through the denoiser together.
            for chunk, share in self.iterate_chunks(map(self.compute_micro_batch_number, turns)):
                # Predict, compare with the targets, differentiate.
                losses += self.backward_chunk(chunk, share)
                copies.collect()
        return self.reduce_losses(losses)

    def backward_chunk(
        self, chunk: Sequence[MicroBatch], share: float | None
    ) -> list[torch.Tensor]:
        """Run one forward and backward pass, which adds to the gradients of the copies. Returns
        total, instance and prior loss (3,) of each micro-batch."""
        losses = self.compute_losses(chunk, share)
        total = sum((parts.total for parts in losses[1:]), losses[0].total)
        self.accelerator.backward(total / self.config.gradient_accumulation_steps)
        return [
            torch.stack([parts.total.detach(), parts.instance, parts.prior]) for parts in losses
        ]

    def compute_losses(
        self, chunk: Sequence[MicroBatch], share: float | None = None
    ) -> list[objective.LossParts]:
        """Compute the loss of each micro-batch of a chunk, which passes through the denoiser
        together. `share` is that of a part of a micro-batch, whose parts sum to its loss."""
        # The frozen base's prediction is the target of the prior's images.
        base_predictions: list[torch.Tensor | None] = [None] * len(chunk)
        if self.is_base_prior:
            prior_inputs = [self.build_prior_inputs(micro_batch) for micro_batch in chunk]
            base_predictions = forward_together(self.forward_base, prior_inputs)
        predictions = forward_together(self.predict, [micro_batch.inputs for micro_batch in chunk])

        # Compare with the targets.
        losses = []
        for micro_batch, prediction, base_prediction in zip(
            chunk, predictions, base_predictions, strict=True
        ):
            parts = self.compute_loss(micro_batch, prediction, base_prediction)
            losses.append(parts if share is None else parts.share(share))
        return losses

    def compute_loss(
        self,
        micro_batch: MicroBatch,
        prediction: torch.Tensor,
        base_prediction: torch.Tensor | None,
    ) -> objective.LossParts:
        """Compute the loss of a micro-batch.

        prediction: (B, C, h, w)
        base_prediction: (B/2, C, h, w) the target of the prior's half, if the base is the prior
        """
        config, schedule = self.config, self.schedule
        target = micro_batch.target
        if base_prediction is not None:
            target = torch.cat([target[: micro_batch.instance_count], base_prediction])

        # Weights of the images' errors by their timesteps.
        weights = objective.compute_weights(
            config,
            schedule,
            micro_batch.inputs.noisy_sample.timestep_indices,
            instance_count=micro_batch.instance_count,
        )
        return objective.compute_loss(
            prediction,
            target,
            weights,
            instance_count=micro_batch.instance_count,
            prior_loss_weight=config.prior_loss_weight,
            mask=micro_batch.mask,
        )

    def iterate_chunks(
        self, numbers: Iterable[int]
    ) -> Iterator[tuple[list[MicroBatch], float | None]]:
        """Yield what passes through the denoiser together: whole micro-batches of these numbers, or
        a part of one with its share."""
        images_per_pass = self.config.images_per_pass
        images_per_micro_batch = self.config.images_per_micro_batch
        micro_batches = map(self.build_micro_batch, numbers)
        if images_per_pass >= images_per_micro_batch:
            max_count = images_per_pass // images_per_micro_batch
            for chunk in collect_same_size(micro_batches, max_count):
                yield chunk, None
        else:
            for micro_batch in micro_batches:
                for part, share in micro_batch.split_chunks(images_per_pass):
                    yield [part], share

    def stop_compiling(self, reason: str) -> None:
        """Continue with uncompiled blocks, and log the reason."""
        for block in self.compiled_blocks:
            block._compiled_call_impl = None
        self.compiled_blocks = []
        logger.warning("--compile: %s: %s", FALLBACK_NOTE, reason)

    def apply_settings(self, flag: str, settings: Mapping[str, Any]) -> None:
        """Change settings that save memory (`plan.memory_plans`), and log their `flag`."""
        devices.free_unused_memory(self.device)
        logger.warning("the first step ran out of memory: it is done again with %s.", flag)
        config, inputs = replace(self.config, **settings), self.inputs

        # How the base is quantized, and what its layers keep for the backward pass.
        if config.base_quantization != self.config.base_quantization:
            quantize(inputs.denoiser, config.base_quantization, inputs.dtype, self.device)
        for module in self.components.values():
            apply_gradient_checkpointing(config, module)
        if settings.keys() & {"stream_blocks", "streamed_share"}:
            if inputs.streamed_blocks:
                inputs.streamed_blocks.end()
            share = config.streamed_share
            inputs.streamed_blocks = StreamedBlocks(inputs.denoiser, self.device, share=share)

        # New copies: the old ones hold the old weights, and what an interrupted step left.
        self.working_copies = fast_linear.WorkingCopies(*self.components.values())
        self.config = config
        self.on_new_settings(config)

    def begin_step(self) -> None:
        """Turn dropout on, and clear the gradients."""
        for module in self.components.values():
            if not module.training:  # as `train()` walks over thousands of modules
                module.train()
        self.optimizer.zero_grad(set_to_none=True)

    def compute_micro_batch_number(self, turn: int) -> int:
        """Return the number of this process's micro-batch within the run. `turn` counts the
        accumulation."""
        count, world = self.config.gradient_accumulation_steps, self.accelerator.num_processes
        return (self.step * count + turn) * world + self.accelerator.process_index

    def update_adapter(self, losses: torch.Tensor) -> StepLosses:
        """Average and clip the gradients, and take an optimizer step. If the norm that is returned
        is not finite, fp16 has skipped the step.

        losses: (3,) of `accumulate_gradients`
        """
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
        """Swap the adapter's averaged weights in for the duration of the block, as they are
        published, scored and sampled. Images are drawn with copies of them, as steps are."""
        # Sampling would need compiled graphs of its own.
        pause = torch.compiler.set_stance("force_eager") if self.compiled_blocks else nullcontext()
        with (
            pause,
            use_averaged_weights(self.average, self.parameters),
            self.working_copies.attach_copies(),
        ):
            yield

    def build_micro_batch(self, number: int) -> MicroBatch:
        """Load a micro-batch of the run, add noise, and move it to the device."""
        config = self.config
        batch = self.load_batch(number)
        names = (config.seed, "micro", number)
        torch.manual_seed(compute_seed(*names, "dropout"))

        # Noise and timesteps are drawn on the CPU: the same on every device.
        noise = torch.randn(batch.latents.shape, generator=seed_generator(*names, "noise"))
        offset_generator = seed_generator(*names, "noise offset")
        tensors = {
            "latents": batch.latents,
            "mask": batch.mask,
            "noise": objective.add_noise_offset(noise, config.noise_offset, offset_generator),
            "index": self.sample_timesteps(batch, seed_generator(*names, "level")),
        }
        tensors |= {("photo", name): tensor for name, tensor in batch.photo_inputs.items()}

        # All move together, but for embeddings of trained encoders, which are on the device.
        embeddings = self.encode_prompts(batch.prompts)
        for row, embedding in enumerate(embeddings):
            tensors |= {(row, name): tensor for name, tensor in embedding.items()}
        moved = dataset.move_tensors(tensors, self.device)
        text_embeddings = []
        for row, embedding in enumerate(embeddings):
            text_embeddings.append({name: moved[row, name] for name in embedding})

        # Noised latents, and the target of the prediction.
        latents, noise, index = moved["latents"], moved["noise"], moved["index"]
        return MicroBatch(
            inputs=DenoiserInputs(
                noisy_sample=objective.add_noise(self.schedule, latents, noise, index),
                text_embeddings=tuple(text_embeddings),
                photo_inputs={name: moved["photo", name] for name in batch.photo_inputs},
                prompts=tuple(batch.prompts),
            ),
            target=objective.compute_target(self.schedule, latents, noise, index),
            mask=moved["mask"],
            instance_count=batch.instance_count,
        )

    def sample_timesteps(
        self, batch: dataset.TrainBatch, generator: torch.Generator
    ) -> torch.Tensor:
        """Sample indices (B,) into the noise schedule, as the settings say."""
        config, schedule = self.config, self.inputs.schedule
        count = len(batch.latents)
        if schedule.style != "flow":
            return torch.randint(len(schedule), (count,), generator=generator)

        # A larger image has more tokens, which shifts its timesteps towards noise.
        token_counts = None
        if config.shift_timesteps:
            target_sizes = batch.photo_inputs["time_ids"][:, 4:]
            token_counts = target_sizes.prod(1) / PX_PER_TOKEN
        return objective.sample_flow_timesteps(
            schedule,
            count,
            generator,
            scheme=config.weighting_scheme or "none",
            mean=config.logit_mean,
            std=config.logit_std,
            mode=config.mode_scale,
            tokens=token_counts,
        )

    def load_batch(self, number: int) -> dataset.TrainBatch:
        """Load a micro-batch of the run, with its prior half if the run has one."""
        dataloader, batch_size = self.inputs.dataloader, self.config.train_batch_size
        indices = range(number * batch_size, (number + 1) * batch_size)
        batch = dataloader.load_batch(indices)
        if not self.is_base_prior:
            return batch

        # The base's own prediction is the prior: the same images, with prompts of their class.
        subjects = map(dataloader.instance.get_subject, indices)
        class_prompts = [self.class_prompts[subject] for subject in subjects]
        return batch.add_base_prior(sample_prior_prompts(self.config, class_prompts, number))

    def predict(self, inputs: DenoiserInputs) -> torch.Tensor:
        """Return the denoiser's prediction (B, C, h, w) in fp32.

        `photo_inputs` stay fp32: bf16 would round a time id of 1365 px to 1368.
        """
        noisy, family = inputs.noisy_sample, self.inputs.family
        to = {"device": self.device, "dtype": self.inputs.dtype}
        embeddings = [families.cast_embedding(text, **to) for text in inputs.text_embeddings]
        output = family.predict(
            self.inputs.denoiser,
            noisy.denoiser_input.to(**to),
            noisy.timesteps,
            **family.select_photo_inputs(inputs.photo_inputs),
            **family.collate(embeddings),
        )
        return objective.convert_prediction(self.schedule, output.float(), noisy)

    def build_prior_inputs(self, micro_batch: MicroBatch) -> DenoiserInputs:
        """Return the inputs of the prior half, with text embeddings of the untrained encoders."""
        inputs = micro_batch.inputs[micro_batch.instance_count :]
        if self.config.train_text_encoder:
            embeddings = self.inputs.text_cache(list(inputs.prompts))
            return replace(inputs, text_embeddings=tuple(embeddings))
        return inputs

    @torch.no_grad()
    def forward_base(self, inputs: DenoiserInputs) -> torch.Tensor:
        """Return the frozen base's prediction (B/2, C, h, w) for the prior half: its target."""
        with moslora.disable_layers(self.lora_layers):
            return self.predict(inputs)

    def encode_prompts(self, prompts: list[str]) -> list[families.TextEmbedding]:
        """Return cached text embeddings, or live ones with gradients where the text encoders are
        trained."""
        if self.config.train_text_encoder:
            return self.inputs.family.encode_prompts(self.inputs.pipeline, prompts)
        return self.inputs.text_cache(prompts)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the denoiser's A and B in the next step, times Prodigy's estimate."""
        group = self.optimizer.param_groups[0]
        return group["lr"] * group.get("d", 1.0)

    @property
    def is_base_prior(self) -> bool:
        return self.config.with_prior_preservation and self.config.prior == "adapter_off"

    def _average_gradients(self) -> None:
        """Average the gradients over the processes, in one all-reduce."""
        if self.accelerator.num_processes == 1:
            return
        grads = [p.grad for p in self.parameters if p.grad is not None]
        mean = distributed.reduce_mean(self.accelerator, parameters_to_vector(grads))
        vector_to_parameters(mean, grads)

    def reduce_losses(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Average losses (3,) of micro-batches, or of their parts, which sum to them, over the step
        and all processes."""
        count = self.config.gradient_accumulation_steps
        mean = torch.stack(losses).sum(0) / count
        return distributed.reduce_mean(self.accelerator, mean)


def sample_prior_prompts(
    config: TrainConfig, class_prompts: list[str], micro_batch: int
) -> list[str]:
    """Return for each class prompt itself or, with equal chance, a random one of the setting
    `prior_prompts`."""
    rng = seed_rng(config.seed, "micro", micro_batch, "prior prompts")
    prompts = []
    for class_prompt in class_prompts:
        alternative = rng.choice(config.prior_prompts or (class_prompt,))
        prompts.append(rng.choice((class_prompt, alternative)))
    return prompts
