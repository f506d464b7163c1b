"""An independent judge of pictures: kind, main colour and place, trained on renders only.

    python -m toybox.data.render_dataset --out TOYS --count 10000 --seed 2 --all_combinations    # once
    python -m toybox.readers.judge --data TOYS --out WORK/judge --steps 2500    # judge.safetensors, here too

    from toybox.readers import judge
    readings = judge.load().read(images)          # uint8 (N,H,W,3) -> list[Reading]

It shares no weights with the base and is never trained on generated pictures; noise, blur and shifts in its
training make it insensitive to sharpness.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from toybox.data.renders import Renders, to_pixels
from toybox.learning.channels_last import to_channels_last, use_fast_group_norm
from toybox.learning.training import MasterWeights, Run
from toybox.world import COLOURS, KINDS, PLACES

__all__ = ["Judge", "Reading", "load"]

WEIGHTS = Path(__file__).with_name("judge.safetensors")
LABELS = {"kind": KINDS, "colour": tuple(COLOURS), "place": PLACES}


@dataclass(frozen=True)
class Reading:
    """What the judge reads from one picture, with its confidence in each answer."""

    kind: str
    colour: str
    place: str
    confidence: tuple[float, float, float]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """A small convolutional network with three linear heads: pixels (N,3,128,128) in [-1, 1] -> logits of each."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64, 128, 160)
        self.body = nn.Sequential(*(_block(a, b) for a, b in pairwise(widths)))
        self.heads = nn.ModuleDict({name: nn.Linear(16 * 160, len(labels)) for name, labels in LABELS.items()})

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
        best = {name: values.softmax(1).max(1) for name, values in logits.items()}
        return [
            Reading(
                **{name: LABELS[name][int(best[name].indices[i])] for name in LABELS},
                confidence=tuple(round(float(best[name].values[i]), 4) for name in LABELS),
            )
            for i in range(len(images))
        ]


def load(path: Path = WEIGHTS) -> Judge:
    judge = Judge().eval()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge


def labels_of(rows: list[dict]) -> dict[str, Tensor]:
    """Indices of kind, colour and place of the first toy of each scene, (N,)."""
    toys = [row["scene"]["toys"][0] for row in rows]
    return {
        "kind": torch.tensor([KINDS.index(t["kind"]) for t in toys]),
        "colour": torch.tensor([list(COLOURS).index(t["colour"]) for t in toys]),
        "place": torch.tensor([PLACES.index(row["scene"]["place"]) for row in rows]),
    }


def disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift, enlarge, blur and add noise to pixels (N,3,H,W) at random."""
    if torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    size = int(torch.randint(118, 150, (), generator=generator))
    pixels = interpolate(pixels, size=(size, size), mode="bilinear")
    canvas = nn.functional.pad(pixels, (14, 14, 14, 14), mode="replicate")
    top, left = torch.randint(0, canvas.shape[-1] - 127, (2,), generator=generator).tolist()
    pixels = canvas[..., top : top + 128, left : left + 128]
    if torch.rand((), generator=generator) < 0.3:
        pixels = avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = 0.08 * float(torch.rand((), generator=generator))
    return pixels + noise * torch.randn(pixels.shape, generator=generator)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    renders = Renders(args.data)
    single = [i for i in range(len(renders) - 1000) if len(renders.rows[i]["scene"]["toys"]) == 1]
    judge = use_fast_group_norm(load(args.start).train() if args.start else Judge())
    weights = MasterWeights(
        judge, muon_lr=0.02, adamw_lr=1e-3, adamw_names=("heads",), weight_decay=0.01, ema_decay=0.995
    )
    run = Run(args.out, weights, args.steps, minutes=args.minutes, save_every=500, log_every=50)
    for step in run:
        generator = run.generator(step, salt=args.salt)
        picked = [single[i] for i in torch.randint(len(single), (args.batch,), generator=generator).tolist()]
        pixels = to_channels_last(disturb(to_pixels(renders.images(picked)), generator))
        logits, labels = judge(pixels), labels_of([renders.rows[i] for i in picked])
        loss = torch.stack([cross_entropy(logits[name], labels[name]) for name in LABELS]).sum()
        loss.backward()
        norm = weights.step(run.rate(step))
        right = {name: (logits[name].argmax(1) == labels[name]).float().mean() for name in LABELS}
        run.add(loss=loss, **right, grad_norm=norm)
    export(weights, renders, args.out)


def export(weights: MasterWeights, renders: Renders, out: Path) -> None:
    """Averaged weights, fp16, to OUT and beside this file; accuracy on the held-back renders of one toy."""
    save_file({k: v.half().contiguous() for k, v in weights.averaged().items()}, out / "judge.safetensors")
    shutil.copy(out / "judge.safetensors", WEIGHTS)
    held_back = range(len(renders) - 1000, len(renders))
    picked = [i for i in held_back if len(renders.rows[i]["scene"]["toys"]) == 1]
    judge, labels = load(), labels_of([renders.rows[i] for i in picked])
    readings = [r for part in torch.tensor(picked).split(100) for r in judge.read(renders.images(part))]
    right = {n: [getattr(r, n) == LABELS[n][int(t)] for r, t in zip(readings, labels[n])] for n in LABELS}
    report = {f"{name}_accuracy": round(sum(values) / len(values), 4) for name, values in right.items()}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--start", type=Path, help="the weights of a finished judge to go on from")
    parser.add_argument("--salt", type=int, default=3, help="another number draws other batches")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
