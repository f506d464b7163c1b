"""One optimizer step: gradients from micro-batches, then an update of the adapter.

Every random draw has the name (seed, what, micro-batch number). Micro-batches are counted over steps, accumulation and
processes, so one process with accumulation 2 draws what two processes draw. One all-reduce per step averages the
adapters' gradients over processes. No module is wrapped, so any part of the base can be trained. Adapters are fp32; the
frozen base computes in its own dtype, with copies of the adapter made once per step.

`--compile` compiles each of the UNet's transformer blocks in place, so that no checkpoint key changes its name. Blocks
of one width share a graph, which stays valid with recomputation and without the adapter.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dreambooth_moslora.adapters import fast_linear, moslora
from dreambooth_moslora.base import families, load
from dreambooth_moslora.core import StopRequestedError, UserError, generator, is_out_of_memory, one_line, rng, seed_of
from dreambooth_moslora.plan import memory, processes
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import adapters, objective, photo_stream, prepare
from dreambooth_moslora.training.checkpoint import restore_optimizer, restore_weights
from dreambooth_moslora.training.optimizer import average_of, lent, make_lr_schedule, make_optimizer, parameter_groups


def prior_prompts(config: TrainConfig, classes: list[str], micro_batch: int) -> list[str]:
    """For each photo the prompt of its class, or with equal chance a random one of `prior_prompts`."""
    draws = rng(config.seed, "micro", micro_batch, "prior prompts")
    return [draws.choice((of_class, draws.choice(config.prior_prompts or (of_class,)))) for of_class in classes]


@dataclass(frozen=True)
class Rows:
    noisy: objective.NoisySample
    texts: tuple[families.Text, ...]  # (B)
    time_ids: torch.Tensor  # (B, 6) with sizes and crops
    prompts: tuple[str, ...]  # (B)

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        noisy = objective.NoisySample(*map(torch.cat, zip(*(part.noisy.tensors for part in parts), strict=True)))
        texts, prompts = (tuple(one for part in parts for one in getattr(part, name)) for name in ("texts", "prompts"))
        return cls(noisy, texts, torch.cat([part.time_ids for part in parts]), prompts)

    def __getitem__(self, some: slice) -> "Rows":
        noisy = objective.NoisySample(*(tensor[some] for tensor in self.noisy.tensors))
        return Rows(noisy, self.texts[some], self.time_ids[some], self.prompts[some])

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def size(self) -> tuple[int, ...]:
        """(h, w) of the latents."""
        return tuple(self.noisy.latents.shape[-2:])


@dataclass(frozen=True)
class MicroBatch:
    """The first `instance_count` images are the subject's."""

    rows: Rows
    target: torch.Tensor  # (B, 4, h, w); with the base as prior its answer is half of it
    mask: torch.Tensor | None  # (B, 1, h, w)
    instance_count: int

    def parts(self, most: int) -> Iterator[tuple["MicroBatch", float]]:
        """Parts of at most so many images, each the subject's alone or the prior's alone, and its share of these."""
        for start, end in ((0, self.instance_count), (self.instance_count, len(self.rows))):
            for first in range(start, end, most):
                some = slice(first, min(first + most, end))
                mask, size = None if self.mask is None else self.mask[some], some.stop - first
                part = MicroBatch(self.rows[some], self.target[some], mask, 0 if start else size)
                yield part, size / (end - start)


logger = logging.getLogger(__name__)

BACKEND = "inductor"
GOES_ON = "the run goes on without"
PX_A_TOKEN = 16 * 16  # Of a picture, in the transformers whose scheduler shifts levels by the number of tokens
GRAPHS = 32  # Of one kind of block; with buckets, the second size makes one graph for all sizes


@dataclass(frozen=True)
class StepLosses:
    total: float
    instance: float
    prior: float | None  # None without a prior in the step


class TrainStep:
    """The adapter, its optimizer, and the steps done. `trained` are the adapter's `parameters` and new tokens."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: prepare.TrainInputs,
        accelerator: Accelerator,
        max_train_steps: int,
        checkpoint: Path | None = None,
        step: int = 0,
    ):
        self.config, self.inputs, self.accelerator, self.step = config, inputs, accelerator, step
        speed = memory.speed_of(config, accelerator.device.type, max_train_steps - step)
        if speed.searches:
            torch.backends.cudnn.benchmark = True
        self.class_prompts = [subject.class_prompt for subject in config.each_subject]
        self.components = adapters.trained_modules(config, inputs.family.facts, inputs.pipeline)
        adapters.add_adapters(config, self.components, checkpoint, start=inputs.start)
        inputs.start = None  # free its tensors
        self.compiled = []  # the transformer blocks that are compiled at their first call
        if speed.compiled:
            kinds = families.block_classes(inputs.denoiser)
            self.compiled = [block for block in inputs.denoiser.modules() if type(block).__name__ in kinds]
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
            for block in self.compiled:
                block.compile(backend=BACKEND)
        if accelerator.is_main_process and speed.compiled:
            logger.warning("%s", speed.sentence())
        self.parameters = [p for module in self.components.values() for _, p in moslora.adapter_parameters(module)]
        self.copies = fast_linear.WorkingCopies(*self.components.values())
        self.lora_layers = [layer for module in self.components.values() for layer in moslora.lora_layers(module)]
        self.learnt: adapters.LearntTokens | None = None
        if config.train_text_encoder_ti:
            frozen = inputs.pipeline, inputs.prompt_embeds
            self.learnt = adapters.LearntTokens(config, *frozen, max_train_steps, checkpoint)
        tokens = self.learnt.parameters if self.learnt else []
        self.trained = [*self.parameters, *tokens]
        groups = parameter_groups(config, self.components, accelerator.num_processes, tokens)
        optimizer = make_optimizer(config, groups)
        self.lr_schedule = make_lr_schedule(config, optimizer, max_train_steps)
        self.average = average_of(config, self.trained, optimizer)
        if checkpoint is not None:
            restore_optimizer(checkpoint, step, optimizer, self.lr_schedule, accelerator.scaler)
        if checkpoint is not None and self.average is not None:
            restore_weights(checkpoint, self.trained)
        self.optimizer = accelerator.prepare(optimizer)
        self.schedule, self.device = inputs.schedule.to(accelerator.device), accelerator.device

    def accumulate_gradients(self) -> StepLosses:
        """Forward and backward passes of this process's micro-batches; again without compilation if that fails."""
        try:
            return self._accumulate()
        except (UserError, StopRequestedError):
            raise
        except Exception as error:  # compilers and what they call raise what they like
            if is_out_of_memory(error) or not self.compiled:
                raise
            for block in self.compiled:
                block._compiled_call_impl = None
            self.compiled = []
            logger.warning("--compile: %s: %s", GOES_ON, one_line(f"{type(error).__name__} {error}", 200))
        return self._accumulate()

    def go_on_as(self, config: TrainConfig) -> None:
        """Take settings that differ from the present ones in what `memory.leaner` changes."""
        inputs = self.inputs
        if config.base_quantization != self.config.base_quantization:
            load.quantize(inputs.denoiser, config.base_quantization, inputs.dtype, self.device)
            inputs.base = prepare.held_as(config, inputs.denoiser, inputs.dtype)
        for module in self.components.values():
            adapters.recompute(config, module)

        # The copies know the layers' weights, and what a step that broke off has left.
        self.copies = fast_linear.WorkingCopies(*self.components.values())
        self.config = config

    def _accumulate(self) -> StepLosses:
        self.begin()
        found = []
        with self.copies.for_one_step() as copies:
            for micros, share in self.passes():
                found += self.differentiated(micros, share)
                copies.collect()
        return self.mean_of(found)

    def passes(self) -> Iterator[tuple[list[MicroBatch], float | None]]:
        """What passes together through the denoiser, one after the other: whole micro-batches, or a part of one with
        its share."""
        most, whole = self.config.images_a_pass, self.config.images_a_micro_batch
        micros = (self.micro_batch(self.number_of(turn)) for turn in range(self.config.gradient_accumulation_steps))
        if most >= whole:
            yield from ((together, None) for together in alike(micros, most // whole))
        else:
            yield from (([part], share) for micro in micros for part, share in micro.parts(most))

    def differentiated(self, micros: Sequence[MicroBatch], share: float | None) -> list[torch.Tensor]:
        """The pass forward and backward. Returns the `numbers_of` (3,) each; gradients are added to the copies'."""
        losses = [parts if share is None else parts.share(share) for parts in self.losses(micros)]
        total = sum((parts.total for parts in losses[1:]), losses[0].total)
        self.accelerator.backward(total / self.config.gradient_accumulation_steps)
        return [numbers_of(parts) for parts in losses]

    def begin(self) -> None:
        self.train_mode()
        self.optimizer.zero_grad(set_to_none=True)

    def number_of(self, turn: int) -> int:
        """The number of this process's micro-batch within the run; `turn` counts the accumulation."""
        count, world = self.config.gradient_accumulation_steps, self.accelerator.num_processes
        return (self.step * count + turn) * world + self.accelerator.process_index

    def update_adapter(self) -> float:
        """Average and clip gradients, and take a step. Returns the norm; if not finite, fp16 has skipped it."""
        with self.learnt.step(self.step) if self.learnt else nullcontext():
            self._average_gradients()
            norm = self.accelerator.clip_grad_norm_(self.trained, self.config.max_grad_norm or math.inf)
            self.optimizer.step()
        norm = float(norm)
        if math.isfinite(norm):
            self.lr_schedule.step()
            self.step += 1
            if self.average is not None:
                self.average.update(self.step)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The adapter holds its average, as it is published, scored and sampled, for the length of the block."""
        # pictures would need graphs of their own
        pause = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        apart = self.learnt.averaged() if self.learnt and self.average is not None else nullcontext()
        with pause, apart, lent(self.average, self.trained):
            yield

    def micro_batch_losses(self, micro_batch: int) -> Iterator[objective.LossParts]:
        """Those of the passes of one micro-batch, which sum to its loss: each is differentiated before the next."""
        micro, most = self.micro_batch(micro_batch), self.config.images_a_pass
        if most >= self.config.images_a_micro_batch:
            yield self.losses([micro])[0]
            return
        for part, share in micro.parts(most):
            yield self.losses([part])[0].share(share)

    def losses(self, micros: Sequence[MicroBatch]) -> list[objective.LossParts]:
        """The loss of each of these, which pass through the denoiser together."""
        answers: list[torch.Tensor | None] = [None] * len(micros)
        if self.base_is_prior:
            answers = predictions(self.base_prediction, [self.prior_rows(micro) for micro in micros])
        of_each = predictions(self.predict, [micro.rows for micro in micros])
        return [self.loss_of(*own) for own in zip(micros, of_each, answers, strict=True)]

    def micro_batch(self, micro_batch: int) -> MicroBatch:
        """The run's micro-batch of this number: drawn on the CPU with noise and noise levels, then moved."""
        config, batch = self.config, self.batch_at(micro_batch)
        names = (config.seed, "micro", micro_batch)
        torch.manual_seed(seed_of(*names, "dropout"))
        noise = torch.randn(batch.latents.shape, generator=generator(*names, "noise"))
        schedule, count, draws = self.inputs.schedule, len(batch.latents), generator(*names, "level")
        if schedule.style == "flow":
            scheme = (config.weighting_scheme or "none", config.logit_mean, config.logit_std, config.mode_scale)
            tokens = batch.time_ids[:, 4:].prod(1) / PX_A_TOKEN if config.shift_timesteps else None
            index = objective.flow_levels(schedule, count, draws, *scheme, tokens)
        else:
            bias = (config.timestep_bias_strategy, config.timestep_bias_multiplier, config.timestep_bias_portion)
            index = objective.sample_timesteps(schedule, count, draws, *bias)
        drawn = {
            "latents": batch.latents,
            "time_ids": batch.time_ids,
            "mask": batch.mask,
            "noise": objective.offset_noise(noise, config.noise_offset, generator(*names, "noise offset")),
            "index": index,
        }
        texts = [] if config.keeps_text_encoders else self.inputs.prompt_embeds(batch.prompts)
        named = [{(number, name): tensor for name, tensor in text.items()} for number, text in enumerate(texts)]
        of_texts = {key: tensor for text in named for key, tensor in text.items()}
        moved = photo_stream.move_together(drawn | of_texts, self.device)
        if config.keeps_text_encoders:
            texts = self.texts(batch.prompts)
        else:
            texts = [{name: moved[number, name] for _, name in text} for number, text in enumerate(named)]
        noisy = objective.add_noise(self.schedule, moved["latents"], moved["noise"], moved["index"])
        target = objective.loss_target(self.schedule, moved["latents"], moved["noise"], noisy.index)
        rows = Rows(noisy, tuple(texts), moved["time_ids"], tuple(batch.prompts))
        return MicroBatch(rows, target, moved["mask"], batch.instance_count)

    def loss_of(self, micro: MicroBatch, prediction: torch.Tensor, answer: torch.Tensor | None) -> objective.LossParts:
        """The loss of `prediction` (B, 4, h, w); `answer` (B/2, 4, h, w): the base's, the prior half's target."""
        config, schedule, index, count = self.config, self.schedule, micro.rows.noisy.index, micro.instance_count
        target = micro.target if answer is None else torch.cat([micro.target[:count], answer])
        names = objective.weightings_of(config, schedule)
        weights = objective.weights_of(names, schedule, index, count, config.snr_gamma)
        error = objective.pointwise_error(schedule, index, config.loss_type, config.huber_c, config.huber_schedule)
        weight = config.prior_loss_weight * config.prior_every
        return objective.loss(prediction, target, weights, count, weight, micro.mask, error)

    def has_prior(self, micro_batch: int) -> bool:
        """Whether micro-batch number `micro_batch` of the run has a prior half: of each `prior_every` in a row a drawn
        one has, with so many times the weight. The expected gradient is that of a prior in each."""
        every = self.config.prior_every
        turn, place = divmod(micro_batch, every)
        drawn = rng(self.config.seed, "prior's turn", turn).randrange(every)
        return self.config.with_prior_preservation and place == drawn

    def batch_at(self, micro_batch: int) -> photo_stream.TrainBatch:
        """Micro-batch number `micro_batch` of the run, with its prior half if it has one."""
        size, following = self.config.train_batch_size, micro_batch + self.accelerator.num_processes
        batch = self.inputs.batch_at(micro_batch, size, following, self.has_prior)
        if not self.base_is_prior or not self.has_prior(micro_batch):
            return batch
        shown = [self.inputs.instance.subject_at(micro_batch * size + place) for place in range(size)]
        classes = [self.class_prompts[number] for number in shown]
        return batch.with_base_as_prior(prior_prompts(self.config, classes, micro_batch))

    def predict(self, rows: Rows) -> torch.Tensor:
        """The denoiser's prediction (B, C, h, w) in fp32. `time_ids` stay fp32: bf16 makes 1365 px 1368."""
        inputs, family, to = self.inputs, self.inputs.family, {"device": self.device, "dtype": self.inputs.dtype}
        words = family.arguments([families.in_dtype(text, **to) for text in rows.texts])
        if inputs.text_products is not None:
            inputs.text_products.show(words["prompt_embeds"], rows.prompts)
        z, t = rows.noisy.unet_input.to(**to), rows.noisy.timesteps
        output = family.predict(inputs.denoiser, z, t, rows.time_ids, **words)
        return objective.prediction_of(self.schedule, output.float(), rows.noisy)

    def prior_rows(self, micro: MicroBatch) -> Rows:
        """The rows of the prior half, with text embeddings of the untrained encoders."""
        rows = micro.rows[micro.instance_count :]
        if self.config.keeps_text_encoders:
            return replace(rows, texts=tuple(self.inputs.prompt_embeds(list(rows.prompts))))
        return rows

    @torch.no_grad()
    def base_prediction(self, rows: Rows) -> torch.Tensor:
        """The frozen base's prediction (B/2, 4, h, w) for the prior half; it is that half's target."""
        with moslora.switched_off(self.lora_layers):
            return self.predict(rows)

    def texts(self, prompts: list[str]) -> list[families.Text]:
        """Cached texts; live ones with gradients when the text encoders or new tokens are trained."""
        if self.learnt:
            return self.learnt.texts(prompts, self.step)
        if self.config.train_text_encoder:
            return self.inputs.family.texts(self.inputs.pipeline, prompts)
        return self.inputs.prompt_embeds(prompts)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the UNet's A and B in the next step, including Prodigy's own estimate."""
        group = self.optimizer.param_groups[0]
        return group["lr"] * group.get("d", 1.0)

    def train_mode(self, training: bool = True) -> None:
        """Set the mode where it differs; `train()` walks over thousands of modules."""
        for module in self.components.values():
            if module.training != training:
                module.train(training)

    @property
    def base_is_prior(self) -> bool:
        return self.config.with_prior_preservation and self.config.prior == "adapter_off"

    def _average_gradients(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        grads = [p.grad for p in self.trained if p.grad is not None]
        vector_to_parameters(processes.mean_over(self.accelerator, parameters_to_vector(grads)), grads)

    def mean_of(self, found: list[torch.Tensor]) -> StepLosses:
        """Means over the step's micro-batches, of the prior's over those that have one, and over all processes. `found`
        are the `numbers_of` (3,) each, or of its parts, which sum to it."""
        count = self.config.gradient_accumulation_steps
        of_all = torch.stack(found).sum(0) / count
        total, instance, prior = processes.mean_over(self.accelerator, of_all).tolist()
        of_step = count * self.accelerator.num_processes
        share = sum(map(self.has_prior, range(self.step * of_step, (self.step + 1) * of_step))) / of_step
        return StepLosses(total, instance, prior / share if share else None)


def alike(micros: Iterable[MicroBatch], most: int) -> Iterator[list[MicroBatch]]:
    """Neighbours of one size, at most so many together. None is drawn before the full group is used."""
    group: list[MicroBatch] = []
    for micro in micros:
        if group and group[0].rows.size != micro.rows.size:
            yield group
            group = []
        group.append(micro)
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group


def predictions(predict: Callable[[Rows], torch.Tensor], parts: Sequence[Rows]) -> list[torch.Tensor | None]:
    """Of each part, computed together; None of a part without rows."""
    some = [part for part in parts if len(part)]
    found = map(predict, some)
    if len(some) > 1:
        found = iter(predict(Rows.joined(some)).split([len(part) for part in some]))
    return [next(found) if len(part) else None for part in parts]


def numbers_of(parts: objective.LossParts) -> torch.Tensor:
    """Total, instance and prior loss (3,); the last is 0 without prior images."""
    prior = torch.zeros_like(parts.instance) if parts.prior is None else parts.prior
    return torch.stack([parts.total.detach(), parts.instance, prior])
