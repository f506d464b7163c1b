"""Trains the toy world's segmentation net on renders, and measures it on fresh ones.

    python -m toybox.learning.train_segmenter --data WORK/toys --out WORK/segmenter --minutes 12
    python -m toybox.learning.train_segmenter --evaluate 200 --net assets/toy-segmenter

Loss: binary cross-entropy + 1 - Dice of each picture. Crops, mirrors, colours, brightness,
contrast, blur and noise are varied at random, so that it also finds toys of other looks. The masks
of the renders are computed once, in pieces; training is resumable. The averaged weights are written
to OUT/model in fp16. The measure is intersection over union with the true masks of renders outside
the training: fresh toys in all combinations, and the eight sample subjects.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, interpolate

from dreambooth_moslora.photos.toy_readers import (
    TRAINING_PX,
    WEIGHTS_NAME,
    ToySegmenter,
    load_segmenter_net,
)
from toybox.data.pieces import load_or_make
from toybox.data.renders import Renders, to_pixels
from toybox.learning.channels_last import replace_group_norms, to_channels_last
from toybox.learning.training import MasterWeights, TrainingRun
from toybox.make_subjects import SUBJECTS, Subject, sample_photo_scenes
from toybox.render import render, render_masks
from toybox.world import Scene, sample_scene

__all__ = ["augment", "evaluate", "iou", "load_masks", "compute_segmentation_loss"]

PIECE = 500


def load_masks(renders: Renders, folder: Path) -> Tensor:
    """bool (N,128,128): the true masks of all renders. Masks already in `folder` are not computed
    again."""
    pieces = []
    for start in range(0, len(renders), PIECE):
        numbers = range(start, min(start + PIECE, len(renders)))
        pieces.append(
            load_or_make(
                folder / f"{numbers.stop}.safetensors", partial(_compute_masks, renders, numbers)
            )["masks"]
        )
        print(f"masks: {numbers.stop} of {len(renders)}", flush=True)
    return torch.cat(pieces)


def _compute_masks(renders: Renders, numbers: range) -> dict[str, Tensor]:
    return {
        "masks": render_masks(
            [Scene.from_dict(renders.rows[i]["scene"]) for i in numbers], TRAINING_PX
        )
    }


def augment(pixels: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels (N,3,H,W) and masks (N,H,W) bool -> the same, each cropped, with other light and
    colours."""
    pairs = [
        _sample_view(torch.cat([p, m[None]]), generator) for p, m in zip(pixels, masks.float())
    ]
    views = torch.stack(pairs)
    return _shade_random(views[:, :3], generator), views[:, 3] > 0.5


def _sample_view(picture: Tensor, generator: torch.Generator) -> Tensor:
    """(4,H,W): a crop of 55 to 100 % of the sides, enlarged to full size; half of them are
    mirrored."""
    whole = picture.shape[-1]
    side = int(whole * (1 - 0.45 * torch.rand((), generator=generator) ** 2))
    top, left_px = torch.randint(0, whole - side + 1, (2,), generator=generator).tolist()
    crop = picture[:, top : top + side, left_px : left_px + side]
    if torch.rand((), generator=generator) < 0.5:
        crop = crop.flip(-1)
    return interpolate(crop[None], size=(whole, whole), mode="bilinear")[0]


def _shade_random(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,3,H,W): random contrast, brightness and tint of each; sometimes permuted channels, blur
    and noise for all."""
    count = len(pixels)
    contrast = 0.6 + 0.7 * torch.rand(count, 1, 1, 1, generator=generator)
    shift = 0.25 * torch.randn(count, 1, 1, 1, generator=generator)
    tint = 0.08 * torch.randn(count, 3, 1, 1, generator=generator)
    pixels = pixels * contrast + shift + tint
    chance = torch.rand(3, generator=generator)
    if chance[0] < 0.25:
        pixels = pixels[:, torch.randperm(3, generator=generator)]
    if chance[1] < 0.25:
        pixels = avg_pool2d(
            torch.nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1
        )
    if chance[2] < 0.25:
        pixels = pixels + 0.05 * torch.randn(pixels.shape, generator=generator)
    return pixels.clamp(-1, 1)


def compute_segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Logits (N,H,W) against bool masks: binary cross-entropy + 1 - Dice, the mean over the
    pictures."""
    truth, predicted = masks.float(), logits.float().sigmoid()
    overlap = 2 * (predicted * truth).sum((1, 2)) + 1
    dice = overlap / (predicted.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return binary_cross_entropy_with_logits(logits.float(), truth) + (1 - dice).mean()


def iou(predicted: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of bool (N,H,W) each, (N,)."""
    return (predicted & truth).sum((1, 2)) / (predicted | truth).sum((1, 2)).clamp_min(1)


def train(args: argparse.Namespace) -> Path:
    """Train; returns the folder of the net."""
    torch.manual_seed(0)
    renders = Renders(args.data, args.limit)
    masks = load_masks(renders, args.out / "masks")
    net = replace_group_norms(ToySegmenter())
    weights = MasterWeights(
        net, muon_lr=0.02, adamw_lr=2e-3, adamw_names=("stem", "head"), ema_decay=0.995
    )
    run = TrainingRun(
        args.out, weights, args.steps, minutes=args.minutes, save_every=100, log_every=50
    )
    for step in run:
        generator = run.seed_generator(step)
        picked = renders.sample(args.batch, generator, held_back=0)
        pixels, truth = augment(to_pixels(renders.load_images(picked)), masks[picked], generator)
        logits = net(to_channels_last(pixels))
        loss = compute_segmentation_loss(logits, truth)
        loss.backward()
        norm = weights.step(run.compute_rate_factor(step))
        run.add(loss=loss, iou=iou(logits > 0, truth).mean(), grad_norm=norm)
    folder = args.out / "model"
    folder.mkdir(exist_ok=True)
    averaged = {name: tensor.half().contiguous() for name, tensor in weights.get_averaged().items()}
    save_file(averaged, folder / WEIGHTS_NAME)
    return folder


def sample_fresh_scenes(count: int) -> list[Scene]:
    """Scenes from a seed that no training uses, including held-out combinations."""
    rng = random.Random("segmenter")
    return [sample_scene(rng) for _ in range(count)]


def evaluate(folder: Path, count: int) -> dict[str, float]:
    """Intersection over union with the true masks, of `count` fresh renders and of the sample
    subjects."""
    net = load_segmenter_net(folder)
    subjects = []
    for name, toy in SUBJECTS.items():
        subjects += sample_photo_scenes(Subject(name, toy, toy.kind))
    report = {"parameters": sum(p.numel() for p in net.parameters())}
    for name, scenes in (("fresh", sample_fresh_scenes(count)), ("subjects", subjects)):
        predicted = net.compute_logits(to_pixels(render(scenes, TRAINING_PX))) > 0
        scores = iou(predicted, render_masks(scenes, TRAINING_PX))
        report[f"{name}_iou"] = round(float(scores.mean()), 4)
        report[f"{name}_iou_p10"] = round(float(scores.quantile(0.1)), 4)
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of renders")
    parser.add_argument("--out", type=Path, help="folder for masks, state and net")
    parser.add_argument("--limit", type=int, default=3000, help="only the first so many renders")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--net", type=Path, help="a finished net: it is only measured")
    parser.add_argument(
        "--evaluate", type=int, default=200, metavar="N", help="fresh renders to measure on"
    )
    args = parser.parse_args(argv)
    if not args.net and not (args.data and args.out):
        parser.error("give --data and --out to train a net, or --net to measure one")
    report = evaluate(args.net or train(args), args.evaluate)
    if args.out:
        (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
