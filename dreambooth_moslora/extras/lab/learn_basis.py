"""Learns A and B that many subjects share.

Each subject has its own mixer, and takes its turn with a micro-batch.

    start: A and B of `--start`, all M = 0
    step n: subject k = k(n): M := M_k, one micro-batch of it, a step of Adam on A, B and M_k

The result is a raw adapter file with A and B, and M = 0: an arm of a study takes it with `basis =
"FILE"`.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from dreambooth_moslora.base.load import architecture
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.lab.basis import put_basis
from dreambooth_moslora.lora import raw_file
from dreambooth_moslora.method import moslora
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.loop import training
from dreambooth_moslora.training.step import TrainStep

SAVE_EVERY = 50
"""Steps between two writes of the file."""

Progress = Callable[[int, int, float, float], None]
"""(steps done, of how many, mean loss of late, seconds left)."""


def learn_basis(
    config: TrainConfig,
    start: str,
    out: Path,
    basis_lr: float,
    progress: Progress,
    should_stop: Callable[[], bool] = bool,
) -> int:
    """Write a basis for the subjects of `config`, learnt in its `max_train_steps`.

    config: of a run with a subject for each mixer; the mixers have its learning rate
    start: the basis to start from
    out: the file, written now and then, at the end, and after a stop
    basis_lr: learning rate of A and B; like that of the mixers, it falls to zero
    progress: called after each step
    should_stop: asked after each step

    Returns the steps done. Raises UserError.
    """
    if len(config.subjects) < 2:
        raise UserError("a basis is learnt over two subjects or more: name a folder for each.")
    with tempfile.TemporaryDirectory() as folder:
        # a run that publishes nothing, of which only the preparation and the loss are used
        own = replace(
            config,
            output_dir=str(Path(folder) / "basis"),
            num_validation_images=0,
            evaluate_steps=None,
            report_to="none",
            enable_bucket=True,  # so that a micro-batch shows one subject
        )
        steps = training(own, should_stop=should_stop)
        try:
            run = next(steps)  # all is prepared, and no step is done
            put_basis(start, run.train_step.components)
            learner = Learner(run.train_step, len(config.subjects), config.learning_rate, basis_lr)
            return learner.learn(
                run.max_train_steps,
                out,
                own,
                progress=progress,
                should_stop=should_stop,
            )
        except StopIteration:  # stopped before the first step
            return 0
        finally:
            steps.close()


class Learner:
    """The shared A and B in the denoiser, and the mixers of `count` subjects."""

    def __init__(self, step: TrainStep, count: int, mixer_lr: float, basis_lr: float):
        self.step = step

        # the matrices in the denoiser: A and B stay there, mixers are put there by turns
        (denoiser,) = step.components.values()  # text encoders are not trained
        self.live = [mixer for _, mixer in moslora.mixer_parameters(denoiser)]
        named = moslora.adapter_parameters(denoiser)
        self.shared = [matrix for name, matrix in named if not name.endswith(".mixer")]

        # the mixers of each subject, in one vector
        size = sum(mixer.numel() for mixer in self.live)
        self.subjects = [torch.nn.Parameter(self.live[0].new_zeros(size)) for _ in range(count)]

        groups = [
            {"params": self.shared, "lr": basis_lr},
            {"params": self.subjects, "lr": mixer_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.rates = [basis_lr, mixer_lr]
        self.scaler = step.accelerator.scaler or torch.amp.GradScaler(enabled=False)  # of fp16

    def learn(
        self,
        total: int,
        out: Path,
        config: TrainConfig,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> int:
        """Take `total` steps and write `out`; arguments as in `learn_basis`. Returns the steps
        done."""
        began = time.perf_counter()
        loss = None  # running mean
        for number in range(total):
            found = self.one_step(number, total)
            loss = found if loss is None else 0.9 * loss + 0.1 * found
            done = number + 1
            each_sec = (time.perf_counter() - began) / done
            progress(done, total, loss, each_sec * (total - done))
            if done % SAVE_EVERY == 0 or done == total or should_stop():
                self.save(out, config)
            if should_stop():
                return done
        return total

    def one_step(self, number: int, total: int) -> float:
        """Train A, B and the mixers of the subject whose turn it is; fp16 skips a step that
        overflows. Returns the loss."""
        # put the mixers of the subject whose photos come next into the denoiser
        step = self.step
        size = step.config.train_batch_size
        subject = self.subjects[step.inputs.instance.subject_at(number * size)]
        put(subject.detach(), self.live)

        # differentiate its loss
        step.train_mode()
        summed = torch.zeros((), device=step.device)
        with step.copies.for_one_step() as copies:
            for micros, share in step.passes([number]):
                (parts,) = step.losses(micros, share)
                self.scaler.scale(parts.total).backward()
                copies.collect()
                summed = summed + parts.total.detach()
        loss = float(summed)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {number + 1}: lower --learning_rate or --basis_lr"
            )
        subject.grad = torch.cat([mixer.grad.flatten() for mixer in self.live])

        # update A, B and this subject alone: the others have no gradient
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_([*self.shared, subject], step.config.max_grad_norm)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - number / total)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        # those of the live mixers are not the optimizer's
        self.optimizer.zero_grad(set_to_none=True)
        for mixer in self.live:
            mixer.grad = None
        return loss

    def save(self, out: Path, config: TrainConfig) -> None:
        """Write A and B, with mixers of zeros."""
        put(torch.zeros_like(self.subjects[0]), self.live)
        facts = raw_file.adapter_metadata(
            self.step.components,
            base_id=config.pretrained_model_name_or_path,
            base_architecture=architecture(self.step.inputs.denoiser),
            resolution_px=config.resolution,
        )
        raw_file.save_raw(self.step.components, out, facts)


@torch.no_grad()
def put(values: torch.Tensor, mixers: list[torch.nn.Parameter]) -> None:
    """Copy a vector of all mixers' values into the mixers."""
    parts = values.split([mixer.numel() for mixer in mixers])
    for mixer, part in zip(mixers, parts, strict=True):
        mixer.copy_(part.view_as(mixer))
