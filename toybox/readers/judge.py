"""Independent judge of pictures, trained on renders only: kind, two colours, ornaments and place.

    python -m toybox.data.render_dataset --out TOYS --count 12000 --seed 2 --all_combinations
    python -m toybox.readers.judge --data TOYS --out WORK/judge --steps 2500

The first is run once. The second writes judge.safetensors, also into this folder.

    from toybox.readers import judge
    readings = judge.load().read(images)          # uint8 (N,H,W,3) -> list[Reading]
    readings[0].right(scene)                      # {"kind": True, "colour": True, ...}

It shares no weights with the base and is never trained on generated pictures; noise, blur and
shifts in its training make it insensitive to sharpness.
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    binary_cross_entropy_with_logits,
    cross_entropy,
    interpolate,
)

from toybox.data.renders import Renders, to_pixels
from toybox.drawing.parts import ACCESSORIES
from toybox.learning.channels_last import replace_group_norms, to_channels_last
from toybox.learning.training import MasterWeights, TrainingRun
from toybox.world import COLOURS, KINDS, PLACES, Scene

__all__ = ["LABELS", "ORNAMENTS", "QUESTIONS", "Judge", "Reading", "load"]

WEIGHTS_PATH = Path(__file__).with_name("judge.safetensors")
LABELS = {"kind": KINDS, "colour": tuple(COLOURS), "colour2": tuple(COLOURS), "place": PLACES}
"""Questions with one answer each."""
ORNAMENTS = tuple(ACCESSORIES)
QUESTIONS = (*LABELS, "ornaments")
HELD_BACK = 1000
"""The last renders, which are for evaluation."""
DRESSED_SHARE = 0.4
"""Share of a batch that is drawn among the toys that wear something: only a sixth of all do."""


@dataclass(frozen=True)
class Reading:
    """Answers of the judge about one picture, with its confidence in each, in the order of
    QUESTIONS."""

    kind: str
    colour: str
    colour2: str
    place: str
    ornaments: frozenset[str]
    confidence: tuple[float, ...]

    def check_answers(self, scene: Scene) -> dict[str, bool]:
        """Return whether each answer is true of the scene's first toy; of ornaments, whether just
        those worn are read."""
        toy = scene.toys[0]
        return {
            "kind": self.kind == toy.kind,
            "colour": self.colour == toy.colour,
            "colour2": self.colour2 == toy.colour2,
            "place": self.place == scene.place,
            "ornaments": self.ornaments == set(toy.accessories),
        }


def _build_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """Small convolutional network with a linear head for each question: pixels (N,3,128,128) in
    [-1, 1] -> logits.

    An ornament's logit is above 0 where it is more likely worn than not.
    """

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64, 128, 160)
        self.body = nn.Sequential(*(_build_block(a, b) for a, b in pairwise(widths)))
        answers = LABELS | {"ornaments": ORNAMENTS}
        self.heads = nn.ModuleDict(
            {name: nn.Linear(16 * 160, len(answers[name])) for name in QUESTIONS}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.body(pixels).flatten(1)
        return {name: head(features).float() for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Reading]:
        """uint8 (N,H,W,3), any square size -> a reading of each picture."""
        pixels = to_pixels(images)
        if pixels.shape[-1] != 128:
            pixels = interpolate(pixels, size=(128, 128), mode="bicubic", antialias=True)
        logits = self(pixels.clamp(-1, 1))
        worn = logits.pop("ornaments").sigmoid()
        best = {name: values.softmax(1).max(1) for name, values in logits.items()}
        sure = torch.stack(
            [*(best[name].values for name in LABELS), torch.maximum(worn, 1 - worn).prod(1)], dim=1
        )
        return [
            Reading(
                **{name: LABELS[name][int(best[name].indices[i])] for name in LABELS},
                ornaments=frozenset(
                    name for name, p in zip(ORNAMENTS, worn[i].tolist()) if p > 0.5
                ),
                confidence=tuple(round(p, 4) for p in sure[i].tolist()),
            )
            for i in range(len(images))
        ]


def load(path: Path = WEIGHTS_PATH) -> Judge:
    judge = Judge().eval()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge


def start_from(path: Path) -> Judge:
    """Build a judge with the weights of an earlier one, which may lack some of its heads."""
    judge = Judge()
    _, unknown = judge.load_state_dict(
        {k: v.float() for k, v in load_file(path).items()}, strict=False
    )
    if unknown:
        raise ValueError(f"{path} is not a judge: {', '.join(unknown)}")
    return judge


def build_labels(rows: list[dict]) -> dict[str, Tensor]:
    """Build the labels of each scene's first toy: indices of the answers, (N,); of the ornaments
    which are worn, (N,5) in {0, 1}."""
    scenes = [row["scene"] for row in rows]
    answers = [scene["toys"][0] | {"place": scene["place"]} for scene in scenes]
    targets = {
        name: torch.tensor([names.index(a[name]) for a in answers])
        for name, names in LABELS.items()
    }
    worn = [[float(name in a["accessories"]) for name in ORNAMENTS] for a in answers]
    return targets | {"ornaments": torch.tensor(worn)}


def compute_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the answers, plus that of each ornament; all summed, means over the
    batch."""
    worn = (
        binary_cross_entropy_with_logits(logits["ornaments"], labels["ornaments"], reduction="none")
        .sum(1)
        .mean()
    )
    return worn + sum(cross_entropy(logits[name], labels[name]) for name in LABELS)


def compare_answers(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return which answers (N,) are right."""
    worn = ((logits["ornaments"] > 0) == (labels["ornaments"] > 0)).all(1)
    return {name: logits[name].argmax(1) == labels[name] for name in LABELS} | {"ornaments": worn}


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift, enlarge, blur and add noise to pixels (N,3,H,W) at random."""
    if torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    size = int(torch.randint(118, 150, (), generator=generator))
    pixels = interpolate(pixels, size=(size, size), mode="bilinear")
    canvas = nn.functional.pad(pixels, (14, 14, 14, 14), mode="replicate")
    top_px, left_px = torch.randint(0, canvas.shape[-1] - 127, (2,), generator=generator).tolist()
    pixels = canvas[..., top_px : top_px + 128, left_px : left_px + 128]
    if torch.rand((), generator=generator) < 0.3:
        pixels = avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = 0.08 * float(torch.rand((), generator=generator))
    return pixels + noise * torch.randn(pixels.shape, generator=generator)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    renders = Renders(args.data)
    single = [
        i for i in range(len(renders) - HELD_BACK) if len(renders.rows[i]["scene"]["toys"]) == 1
    ]
    dressed = [i for i in single if renders.rows[i]["scene"]["toys"][0]["accessories"]]
    judge = replace_group_norms(start_from(args.start).train() if args.start else Judge())
    weights = MasterWeights(
        judge,
        muon_lr=args.muon_lr or None,
        adamw_lr=1e-3,
        adamw_names=("heads",),
        weight_decay=0.01,
        ema_decay=0.995,
    )
    run = TrainingRun(
        args.out, weights, args.steps, minutes=args.minutes, save_every=100, log_every=50
    )
    for step in run:
        generator = run.seed_generator(step, salt=args.salt)
        few = int(args.batch * DRESSED_SHARE)
        picked = [
            *sample_indices(dressed, few, generator),
            *sample_indices(single, args.batch - few, generator),
        ]
        pixels = to_channels_last(augment(to_pixels(renders.load_images(picked)), generator))
        logits, labels = judge(pixels), build_labels([renders.rows[i] for i in picked])
        loss = compute_loss(logits, labels)
        loss.backward()
        norm = weights.step(run.compute_rate_factor(step))
        right = {
            name: hits.float().mean() for name, hits in compare_answers(logits, labels).items()
        }
        run.add(loss=loss, **right, grad_norm=norm)
    export(weights, renders, args.out)


def sample_indices(indices: list[int], count: int, generator: torch.Generator) -> list[int]:
    """`count` of the indices, at random, with replacement."""
    return [indices[i] for i in torch.randint(len(indices), (count,), generator=generator).tolist()]


def export(weights: MasterWeights, renders: Renders, out: Path) -> None:
    """Averaged weights, fp16, to OUT and beside this file; accuracy on the held-back renders of one
    toy."""
    save_file(
        {k: v.half().contiguous() for k, v in weights.get_averaged().items()},
        out / "judge.safetensors",
    )
    shutil.copy(out / "judge.safetensors", WEIGHTS_PATH)
    report = measure_accuracy(load(), renders)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(report)


def measure_accuracy(judge: Judge, renders: Renders) -> dict[str, float]:
    """Share of the held-back renders of one toy in which each question is answered right; that of
    ornaments among the toys that wear something too, and for each ornament recall and precision."""
    picked = [
        i
        for i in range(len(renders) - HELD_BACK, len(renders))
        if len(renders.rows[i]["scene"]["toys"]) == 1
    ]
    scenes = [Scene.from_dict(renders.rows[i]["scene"]) for i in picked]
    readings = [
        r for part in torch.tensor(picked).split(100) for r in judge.read(renders.load_images(part))
    ]
    right = [reading.check_answers(scene) for reading, scene in zip(readings, scenes)]
    worn = [(r.ornaments, set(s.toys[0].accessories)) for r, s in zip(readings, scenes)]
    report = {f"{name}_accuracy": share([hits[name] for hits in right]) for name in QUESTIONS}
    report["ornaments_worn_accuracy"] = share([read == true for read, true in worn if true])
    for name in ORNAMENTS:
        report[f"{name}_recall"] = share([name in read for read, true in worn if name in true])
        report[f"{name}_precision"] = share([name in true for read, true in worn if name in read])
    return report


def share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4) if hits else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--muon_lr", type=float, default=0.02, help="rate of the convolutions, by Muon; 0: by AdamW"
    )
    parser.add_argument("--start", type=Path, help="the weights of a finished judge to go on from")
    parser.add_argument("--salt", type=int, default=3, help="another number draws other batches")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
