"""One photo of a sample subject: what helps to learn the subject from it.

    python -m benchmarks.one_photo [--out runs/one_photo]    # 72 trainings, two hours of one core
    python -m benchmarks.one_photo --subjects duck robot --arms l2 --penalty 1e-3

    one         the photo as it is, by the toy's recipe
    true        and photos that a perfect editor would make, sorted by `enlarge`
    mistaken    the same of an editor that changes a look of every second toy
    five        five real photos
    mask        the photo, with T-LoRA's mask on the mixer's rows (Soboleva et al. 2025,
                arXiv 2507.05964): where there is more noise fewer rows learn, and fewer draw
    l2          the photo, with a penalty on the square of ΔW

No editing model knows the toy world: here both editors are renders of other places and sides. All
arms train as many steps. Pictures of eight places that no photo shows are drawn with two seeds. The
likeness is to true renders in these places, as a share of what such renders have among themselves;
place, second colour and ornaments are the share of pictures in which the judge reads the right
ones. An arm, a subject and a seed whose file is there are not run again.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dreambooth_moslora.disk.atomic import atomic_write
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.evaluation.enlarge import Enlargement, Shot, Sorter
from dreambooth_moslora.evaluation.metrics import Encoders, bootstrap_mean, load_encoders
from dreambooth_moslora.evaluation.protocol import plan_of_subject
from dreambooth_moslora.evaluation.report import evaluators_of
from dreambooth_moslora.evaluation.scoring import Evaluation, Evaluator, sampler_draw
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from dreambooth_moslora.method.fast_linear import disable_fast_path
from dreambooth_moslora.method.moslora import matrices_of
from dreambooth_moslora.photos.folder import photo_report, usable_photos
from dreambooth_moslora.plan.distributed import make_accelerator
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings.config_files import load_settings
from dreambooth_moslora.settings.subjects import prompts_of
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.prepare import prepare
from dreambooth_moslora.training.reporter import Reporter, RunContext
from dreambooth_moslora.training.step import TrainStep
from toybox.make_subjects import FOLDER, PHOTO_PLACES, SUBJECTS, load
from toybox.measures.look_alikes import LOOKS
from toybox.render import render, toy_masks
from toybox.world import Scene, Toy, sample_scene, sample_toy

__all__ = ["ARMS", "NoiseMask", "main", "squared_change", "table"]

ARMS = ("one", "true", "mistaken", "five", "mask", "l2")
STUDIED = ("bear", "rocket", "long_eared_rabbit", "train", "tall_cactus", "big_headed_dinosaur")
RECIPE = Path("assets/configs/toy.toml")
STEPS = 160
BATCH = 2
CANDIDATES = 12
MADE_PX = 128  # as the base draws
PLACES = 8
SEEDS_OF_A_PROMPT = (0, 1)
INFERENCE_STEPS = 20
PENALTY = 1e-4
# A measure -> its column
COLUMNS = {
    "likeness": "likeness, of the ceiling",
    "clip_t": "CLIP-T, of true renders'",
    "place": "place right",
    "colour2": "second colour right",
    "ornaments": "ornaments right",
}


class NoiseMask:
    """T-LoRA's mask, on the rows of the mixer: at noise level t of 0 to 1 the first r(t) of r pass,
    r(t) = r/2 + ⌊r/2 · (1 - t)⌋. It is on in training and in drawing, of pictures with a level
    each.

    denoiser: with adapters that have mixers
    levels: its noise levels run from 0 to this
    """

    def __init__(self, denoiser: nn.Module, levels: int = 1000) -> None:
        self.levels = levels
        self.time = torch.zeros(1)
        disable_fast_path(denoiser)
        denoiser.register_forward_pre_hook(self.note, with_kwargs=True)
        for module in denoiser.modules():
            if hasattr(module, "mixer"):
                module.register_forward_hook(self.masked)

    def note(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep the time of each picture, (B,) or (1,)."""
        time_of = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.time = torch.as_tensor(time_of).reshape(-1) / self.levels

    def rows(self, rank: int) -> Tensor:
        """1 for the rows that pass, (B, r)."""
        least = rank // 2
        passing = least + ((rank - least) * (1 - self.time)).floor()
        return (torch.arange(rank) < passing[:, None]).float()

    def masked(self, module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        """B · mask · M · x of x (B, …, r), or (B, r, h, w) of a convolution."""
        (x,) = inputs
        mask = self.rows(len(module.mixer))
        if x.ndim == 4:
            inner = F.conv2d(x, module.mixer[:, :, None, None]) * mask[:, :, None, None]
            return F.conv2d(inner, module.up.flatten(1)[:, :, None, None])
        mask = mask.view(len(mask), *(1,) * (x.ndim - 2), -1)
        return F.linear(F.linear(x, module.mixer) * mask, module.up)


def squared_change(layers: Sequence[nn.Module]) -> Tensor:
    """The sum of ΔW² over all adapted layers, computed in r × r: |s·U·A|² = s²·⟨UᵀU, AAᵀ⟩ with
    U = B·M."""
    total = torch.zeros(())
    for layer in layers:
        parts = matrices_of(layer, "default")
        up = parts.up if parts.mixer is None else parts.up @ parts.mixer
        down = parts.down.flatten(1)
        total = total + parts.scale**2 * ((up.T @ up) * (down @ down.T)).sum()
    return total


class PenalisedStep(TrainStep):
    """The trainer's step with `penalty` times the square of ΔW in its loss."""

    penalty = PENALTY

    def accumulate_gradients(self) -> Tensor:
        losses = super().accumulate_gradients()
        (self.penalty * squared_change(self.lora_layers)).backward()
        return losses


def photos_of(arm: str, subject: str, out: Path, encoders: Encoders) -> Path:
    """The arm's folder of photos; they have captions and masks, as the sample subjects' have."""
    samples = FOLDER / subject
    if arm == "five":
        return samples
    kind = arm if arm in ("true", "mistaken") else "one"
    folder = out / "photos" / kind / subject
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for name in ("subject.json", "00.jpg", "00.txt", "00.mask.png"):
            shutil.copy(samples / name, folder)
        if kind != "one":
            enlarge(folder, subject, kind, encoders)
    return folder


def enlarge(folder: Path, subject: str, kind: str, encoders: Encoders) -> None:
    """Add what an editor would make of the photo, as far as `enlarge`'s sorting keeps it."""
    sample = load(subject)
    rng = random.Random(f"one photo of {subject}")
    scenes = {}
    for number in range(CANDIDATES):
        # The places of the real photos but the first: those of the prompts stay unseen.
        place = PHOTO_PLACES[1 + number % (len(PHOTO_PLACES) - 1)]
        toy = sample.toy
        other = with_another_look(toy, rng)
        if kind == "mistaken" and number % 2:
            toy = other
        prompt = f"a photo of a {sample.token} {sample.class_word} {place}"
        shot = Shot(f"made_{number:02d}.png", SampleRequest(prompt, number), f"{kind} {number}")
        # The camera stands as for the real photos.
        scene = sample_scene(rng, toy, place, held_out=None)
        scenes[shot] = replace(scene, pitch=rng.uniform(0.1, 0.3), distance=rng.uniform(2.0, 2.7))

    with Image.open(folder / "00.jpg") as photo:
        sorter = Sorter(encoders, photo.convert("RGB"))
    enlargement = Enlargement(folder, sorter, base=f"{kind} renders", licence="MIT")
    shots = list(scenes)
    for shot in enlargement.fill(shots, lambda some: drawn([scenes[one] for one in some])):
        if (folder / shot.name).is_file():
            (mask,) = toy_masks([scenes[shot]], MADE_PX)
            stem = (folder / shot.name).with_suffix("")
            Image.fromarray(mask.numpy()).save(f"{stem}.mask.png")
            Path(f"{stem}.txt").write_text(shot.request.prompt, encoding="utf-8")
    enlargement.draw_sheet(shots)


def with_another_look(toy: Toy, rng: random.Random) -> Toy:
    """The toy with one look of another of its kind."""
    look = rng.choice(LOOKS)
    while True:
        other = getattr(sample_toy(rng, toy.kind), look)
        if other != getattr(toy, look):
            return replace(toy, **{look: other})


def drawn(scenes: list[Scene]):
    """Their pictures."""
    for picture in render(scenes, MADE_PX):
        yield Image.fromarray(picture.numpy())


def config_of(folder: Path, subject: str, seed: int, out: Path) -> TrainConfig:
    """The toy's recipe, with fewer steps."""
    sample = load(subject)
    own = prompts_of(sample.token, sample.class_word) | {
        "instance_data_dir": str(folder),
        "output_dir": str(out),
        "seed": seed,
        "max_train_steps": STEPS,
        "train_batch_size": BATCH,
        "num_validation_images": 1,  # or the VAE would be let go
        "validation_steps": None,
    }
    return TrainConfig.from_dict(load_settings(RECIPE) | own)


def evaluator_of(subject: str, encoders: Encoders, out: Path) -> Evaluator:
    """The subject's evaluator, the same for all arms: it knows the five photos and the truth."""
    config = config_of(FOLDER / subject, subject, 0, out)
    photos = usable_photos(photo_report(config))
    plan = plan_of_subject(config, photos, seeds=SEEDS_OF_A_PROMPT)
    plan = plan.smaller(PLACES, len(SEEDS_OF_A_PROMPT), 0, 0, INFERENCE_STEPS)
    (found,) = evaluators_of([config], photos, [plan], encoders, config.resolution)
    return found.of_subject()


def run(arm: str, config: TrainConfig, evaluator: Evaluator, penalty: float) -> Evaluation:
    """Train one arm, and score what it draws."""
    plan = make_plan(config)
    run_dir = RunDir(plan.config.output_dir)
    accelerator = make_accelerator(plan.config, run_dir)
    context = RunContext(
        run_dir, accelerator, Reporter(run_dir, accelerator, None), should_stop=lambda: False
    )
    inputs = prepare(
        plan.config,
        plan.base,
        context,
        usable_photos(plan.photo_report),
        sample_count=STEPS * BATCH,
        prompts=evaluator.plan.prompts,
    )
    kind = PenalisedStep if arm == "l2" else TrainStep
    step = kind(plan.config, inputs, accelerator, STEPS)
    step.penalty = penalty
    if arm == "mask":
        NoiseMask(inputs.denoiser)
    for _ in range(STEPS):
        step.update_adapter(step.accumulate_gradients())

    # What was learnt, and how large it is
    print(f"  square of the change: {squared_change(step.lora_layers).item():.3g}")
    sampler = Sampler(
        pipeline=inputs.pipeline,
        embed=inputs.prompt_embeds,
        resolution_px=config.resolution,
        device=accelerator.device,
        inference_steps=INFERENCE_STEPS,
    )
    return evaluator(sampler_draw(sampler, batch_size=8))


def figures(found: Evaluation) -> dict[str, float]:
    """By the names of COLUMNS."""
    return {
        "likeness": found.mean("truth") / found.mean("truth_ceiling"),
        "clip_t": found.mean("clip_t") / found.mean("clip_t_ceiling"),
        "place": found.mean("judge_place"),
        "colour2": found.mean("judge_colour2"),
        "ornaments": found.mean("judge_ornaments"),
    }


def table(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """A row for each arm of {arm: {subject: figures of each seed}}: means with intervals over the
    subjects, then the paired differences to `one`."""
    lines = [f"| arm | {' | '.join(COLUMNS.values())} |", f"|{'---|' * (1 + len(COLUMNS))}"]
    means = {}
    for arm, of_arm in found.items():
        means[arm] = {}
        for name in COLUMNS:
            of_subjects = [np.mean([one[name] for one in seeds]) for seeds in of_arm.values()]
            means[arm][name] = np.array(of_subjects)
        cells = [str(bootstrap_mean(values)) for values in means[arm].values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    for arm in found:
        if arm == "one" or "one" not in found:
            continue
        cells = [f"{bootstrap_mean(means[arm][name] - means['one'][name]):+}" for name in COLUMNS]
        lines.append(f"| {arm} less one | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=STUDIED)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--penalty", type=float, default=PENALTY, help="of the arm l2")
    parser.add_argument("--out", type=Path, default=Path("runs/one_photo"))
    args = parser.parse_args(argv)
    encoders = load_encoders("toy")

    # A subject's runs follow each other: they share an evaluator, which drew the base's pictures.
    found: dict[str, dict[str, list[dict[str, float]]]] = {arm: {} for arm in args.arms}
    for subject in args.subjects:
        evaluator = None
        for seed in args.seeds:
            for arm in args.arms:
                # The file of one run, which tells whether it is done
                file = args.out / "results" / f"{arm}--{subject}--seed{seed}.json"
                if arm == "l2":
                    file = file.with_stem(f"{file.stem}--{args.penalty:g}")
                if not file.is_file():
                    # Train and score
                    evaluator = evaluator or evaluator_of(subject, encoders, args.out / "run")
                    began = time.perf_counter()
                    folder = photos_of(arm, subject, args.out, encoders)
                    shutil.rmtree(args.out / "run", ignore_errors=True)
                    config = config_of(folder, subject, seed, args.out / "run")
                    one = figures(run(arm, config, evaluator, args.penalty))

                    # Keep the figures
                    file.parent.mkdir(parents=True, exist_ok=True)
                    atomic_write(file, json.dumps(one) + "\n")
                    took = time.perf_counter() - began
                    print(f"{file.stem}: {json.dumps(one)}, {took:.0f} s", flush=True)
                one = json.loads(file.read_text(encoding="utf-8"))
                found[arm].setdefault(subject, []).append(one)
    print(table(found))


if __name__ == "__main__":
    main()
