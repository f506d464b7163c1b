"""Trains the toy world's DINO: a small ViT in DINOv2's format that tells individuals of one kind
apart in any place.

    python -m toybox.data.render_views --out VIEWS --toys 14004 --views 4    # once
    python -m toybox.learning.train_vit --views VIEWS --out WORK/vit --steps 4000

Instance discrimination (InfoNCE between two views of the same toy: other side, other place, other
light), with batches of two kinds, so that the kind alone does not suffice.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from toybox.learning.train_clip import augment
from toybox.learning.training import MasterWeights, TrainingRun, compute_dtype
from toybox.world import KINDS

__all__ = ["ViewDataset", "build_vit", "measure_nearest_accuracy", "measure_separation"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE = 0.07


def build_vit() -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(
            image_size=128,
            patch_size=16,
            hidden_size=160,
            num_hidden_layers=5,
            num_attention_heads=4,
            mlp_ratio=4,
            layerscale_value=1.0,
            attn_implementation="eager",
        )
    )


def convert_to_dino_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (N,H,W,3) -> (N,3,H,W) normalised with ImageNet's mean and deviation, as DINOv2
    expects."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((images.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)


class ViewDataset:
    """images (toys, views, 128, 128, 3) uint8 and the kind of each toy (written by `render_views`).

    The last `held_back` toys, 50 of each kind, are never trained on.
    """

    def __init__(self, folder: Path, held_back: int = 50 * len(KINDS)):
        self.images = np.load(folder / "views.npy", mmap_mode="r")
        self.kinds = np.array(json.loads((folder / "kinds.json").read_text()))
        self.train = len(self.kinds) - held_back

    def sample_pairs(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two views (n,128,128,3) of n different training toys: half of each of two kinds, filled
        up with others if those are too few."""
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        training_kinds = self.kinds[: self.train]
        kinds = rng.choice(np.unique(training_kinds), 2, replace=False)
        toys = np.concatenate(
            [rng.permutation(np.flatnonzero(training_kinds == kind))[: n // 2] for kind in kinds]
        )
        remaining = np.setdiff1d(np.arange(self.train), toys)
        toys = np.concatenate([toys, rng.choice(remaining, n - len(toys), replace=False)])
        first, second = rng.permuted(np.tile(np.arange(self.images.shape[1]), (n, 1)), axis=1)[
            :, :2
        ].T
        stacks = (
            np.stack([self.images[t, v] for t, v in zip(toys, view_rows)])
            for view_rows in (first, second)
        )
        return tuple(torch.from_numpy(images) for images in stacks)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    views = ViewDataset(args.views)
    vit = (
        Dinov2Model.from_pretrained(args.start, torch_dtype=torch.float32).train()
        if args.start
        else build_vit()
    )
    weights = MasterWeights(
        vit,
        muon_lr=0.01,
        adamw_lr=1e-3,
        adamw_names=("embeddings",),
        weight_decay=0.02,
        ema_decay=0.998,
    )
    run = TrainingRun(
        args.out, weights, args.steps, minutes=args.minutes, save_every=500, log_every=50
    )
    for step in run:
        generator = run.seed_generator(step, salt=args.salt)
        first, second = (augment(v, generator) for v in views.sample_pairs(args.batch, generator))
        pixels = convert_to_dino_pixels(torch.cat([first, second]), compute_dtype())
        a, b = normalize(vit(pixels).last_hidden_state[:, 0].float(), dim=-1).chunk(2)
        logits, labels = a @ b.T / TEMPERATURE, torch.arange(len(a))
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        loss.backward()
        norm = weights.step(args.rate * run.compute_rate_factor(step))
        run.add(loss=loss, right=(logits.argmax(1) == labels).float().mean(), grad_norm=norm)
    export(weights, views, args.out)


@torch.no_grad()
def measure_nearest_accuracy(vit: Dinov2Model, views: ViewDataset, individuals: int = 50) -> float:
    """Fraction of views whose nearest other view shows the same toy, among `individuals` held-back
    toys of one kind.

    It is the mean over the kinds. Every view is in another place.
    """
    shares = []
    held_back = np.arange(views.train, len(views.kinds))
    for kind in sorted(set(views.kinds)):
        toys = held_back[views.kinds[held_back] == kind][:individuals]
        if len(toys) < 2:
            continue
        images = torch.from_numpy(np.concatenate([views.images[t] for t in toys]))
        shares.append(measure_separation(vit, images, views.images.shape[1]))
    return sum(shares) / len(shares)


@torch.no_grad()
def measure_separation(vit: Dinov2Model, images: Tensor, views: int) -> float:
    """Fraction of images, uint8 (toys·views, H, W, 3), whose nearest other one shows the same
    toy."""
    v = normalize(vit(convert_to_dino_pixels(images)).last_hidden_state[:, 0], dim=-1)
    owner = torch.arange(len(images)) // views
    nearest = (v @ v.T).fill_diagonal_(-1).argmax(1)
    return float((owner[nearest] == owner).float().mean())


def export(weights: MasterWeights, views: ViewDataset, out: Path) -> None:
    vit = build_vit().eval()
    vit.load_state_dict(weights.get_averaged(), strict=False)
    report = {
        "nearest_neighbour_accuracy": round(measure_nearest_accuracy(vit, views), 4),
        "parameters": sum(p.numel() for p in vit.parameters()),
    }
    vit.half().save_pretrained(out / "model")
    size = {"height": 128, "width": 128}
    BitImageProcessor(
        size={"shortest_edge": 128}, crop_size=size, image_mean=MEAN, image_std=STD
    ).save_pretrained(out / "model")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(report)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--views", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--start", type=Path, help="a finished ViT to go on from")
    parser.add_argument("--salt", type=int, default=2, help="another number draws other batches")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
