"""Trains the decoder to draw the UNet's own latents as cleanly as those of renders.

    python -m toybox.learning.sharpen_decoder --data DATA --samples WORK/samples.safetensors \
        --start WORK/vae/model --out WORK/decoder --minutes 30

The latents that the UNet draws from noise (`toybox.data.sample_latents`) differ from those of
renders, and a decoder that never saw them blurs them. A sample has no true picture. So
discriminators at three scales (Wang et al., "High-resolution image synthesis … with conditional
GANs", 2018) judge whether its picture looks like a render, and the decoder as it was at the start
says where things are. Guidance raises contrast: there the pictures of the start are first given the
renders' contrast, level by level of their Laplacian pyramid. The other half of each batch is
renders with their own latents, as in `toybox.learning.train_vae`. The encoder does not change, so a
UNet that was trained on its latents stays valid. Resumable.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

from toybox.data.dead_leaves import generate_dead_leaves
from toybox.data.renders import Renders, to_pixels
from toybox.learning.adversary import Adversary
from toybox.learning.channels_last import replace_group_norms, to_channels_last
from toybox.learning.train_vae import RATES, compute_reconstruction_loss, export, sample_batch
from toybox.learning.training import MasterWeights, TrainingRun
from toybox.measures.swd import build_laplacian_pyramid, collapse_pyramid

SCALES = (1, 2, 4)
WARMUP = 300  # steps in which the discriminators learn alone
COARSE_PX, FINE_PX = 8, 2
BANDS = 3  # levels of detail above the rest of a picture
ROUNDS = 5
COMPARED_COUNT = 256  # samples, and the renders of their captions, for the contrast


def compute_anchor_loss(y: Tensor, before: Tensor) -> Tensor:
    """Compute how far pictures y (N,3,H,W) moved from those of the decoder `before`: L1 of means
    over 8 px, plus a quarter of that over 2 px."""
    moved = (y - before).float()
    return (
        avg_pool2d(moved, COARSE_PX).abs().mean() + 0.25 * avg_pool2d(moved, FINE_PX).abs().mean()
    )


def split_bands(pictures: Tensor) -> list[Tensor]:
    """Split pictures (N,3,P,P) into their Laplacian pyramid, and the coarsest level into its mean
    colour and its remainder: (N,3,P,P), ..., (N,3,P/8,P/8), and that mean (N,3,1,1)."""
    *finer, coarsest = build_laplacian_pyramid(pictures, pictures.shape[-1] >> BANDS)
    mean = coarsest.mean((2, 3), keepdim=True)
    return [*finer, coarsest - mean, mean]


def compute_contrast(pictures: Tensor) -> list[float]:
    """Root mean square of each band of pictures (N,3,P,P)."""
    return [float(band.square().mean().sqrt()) for band in split_bands(pictures)[:-1]]


def scale_bands(pictures: Tensor, gains: list[float]) -> Tensor:
    """Pictures (N,3,P,P), each of their bands multiplied by its gain."""
    *finer, coarsest, mean = (
        band * gain for band, gain in zip(split_bands(pictures), [*gains, 1.0])
    )
    return collapse_pyramid([*finer, coarsest + mean])


def compute_contrast_gains(decoded: Tensor, true: Tensor) -> list[float]:
    """Gains of the bands that give pictures `decoded` (N,3,P,P) the contrast of `true`.

    The bands of a pyramid overlap, so the gains are corrected `ROUNDS` times.
    """
    target, gains = compute_contrast(true), [1.0] * (BANDS + 1)
    for _ in range(ROUNDS):
        contrast = compute_contrast(scale_bands(decoded, gains))
        gains = [gain * w / f for gain, w, f in zip(gains, target, contrast)]
    return gains


@torch.no_grad()
def measure_sample_gains(vae: AutoencoderKL, samples: Tensor, renders: Renders) -> list[float]:
    """`compute_contrast_gains` of the pictures of unscaled samples (M,4,16,16) to the renders of
    their captions."""
    count = min(COMPARED_COUNT, len(samples))
    decoded = [vae.decode(part.to(vae.device)).sample.cpu() for part in samples[:count].split(32)]
    return compute_contrast_gains(
        torch.cat(decoded).clamp(-1, 1), to_pixels(renders.load_images(range(count)))
    )


def sample_window(size: int, crop: int, generator: torch.Generator) -> tuple[slice, slice]:
    top, left_px = torch.randint(0, size - crop + 1, (2,), generator=generator).tolist()
    return slice(top, top + crop), slice(left_px, left_px + crop)


def sample_renders(
    renders: Renders, count: int, crop_px: int, generator: torch.Generator
) -> Tensor:
    """Pixels (N,3,P,P) at random places on the grid of cells, without selection or mirroring, like
    the samples' crops."""
    rows, columns = sample_window(16, crop_px // 8, generator)
    images = to_pixels(renders.load_images(renders.sample(count, generator)))
    return images[:, :, 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop]


def sample_crops(latents: Tensor, count: int, crop_px: int, generator: torch.Generator) -> Tensor:
    """Crops (N,4,P/8,P/8) of the UNet's samples (M,4,16,16)."""
    rows, columns = sample_window(latents.shape[-1], crop_px // 8, generator)
    picked = torch.randint(len(latents), (count,), generator=generator)
    return latents[picked].float()[:, :, rows, columns]


def train(args: argparse.Namespace) -> AutoencoderKL:
    torch.manual_seed(0)
    renders, leaves = Renders(args.data), torch.from_numpy(generate_dead_leaves(300, 128, seed=5))
    vae = replace_group_norms(
        AutoencoderKL.from_pretrained(args.start, torch_dtype=torch.float32)
    ).to(args.device)
    samples = load_file(args.samples)["latents"].float() / vae.config.scaling_factor
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    gains = measure_sample_gains(vae, samples, renders)
    print(
        "contrast of renders to that of samples, fine to coarse:",
        [round(gain, 3) for gain in gains],
        flush=True,
    )
    at_first = {name: value.clone() for name, value in vae.state_dict().items()}
    weights = MasterWeights(vae, **RATES)
    before = deepcopy(vae).requires_grad_(False)
    judges = {f"scale_{scale}": Adversary(args.adversarial, args.device) for scale in SCALES}
    beside = {name: judge.weights for name, judge in judges.items()}
    run = TrainingRun(
        args.out,
        weights,
        args.steps,
        minutes=args.minutes,
        save_every=100,
        log_every=50,
        beside=beside,
    )
    half = args.batch // 2
    for step in run:
        generator = run.seed_generator(step, salt=args.salt)
        true = to_channels_last(
            sample_renders(renders, half, args.crop_px, generator).to(args.device)
        )
        decoded = to_channels_last(
            sample_crops(samples, half, args.crop_px, generator).to(args.device)
        )
        with torch.no_grad():
            new = old = scale_bands(before.decode(decoded).sample.float(), gains)
        if step >= WARMUP:
            x = to_channels_last(
                sample_batch(renders, leaves, args.batch - half, args.crop_px, generator).to(
                    args.device
                )
            )
            with torch.no_grad():
                z = to_channels_last(vae.encode(x).latent_dist.sample(generator))
            y, new = vae.decode(torch.cat([z, decoded])).sample.split([len(x), half])
            loss = total = compute_reconstruction_loss(x, y) + compute_anchor_loss(new, old)
            for scale, judge in zip(SCALES, judges.values()):
                total = total + judge.compute_loss_term(
                    loss, avg_pool2d(new, scale), vae.decoder.conv_out.weight
                )
            total.backward()
            norm = weights.step(args.rate * run.compute_rate_factor(step - WARMUP))
            moved = (new - old).float().abs().mean()
            run.add(loss=loss, mse=(x - y).float().square().mean(), moved=moved, grad_norm=norm)
        for scale, (name, judge) in zip(SCALES, judges.items()):
            run.add(**{name: judge.step(avg_pool2d(true, scale), avg_pool2d(new, scale))})
    return export(at_first | weights.get_averaged(), renders, args.out, vae.config.scaling_factor)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "samples", "start", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument(
        "--batch", type=int, default=16, help="half of it renders, half of it samples"
    )
    parser.add_argument("--crop_px", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.04, help="factor on the learning rates")
    parser.add_argument(
        "--adversarial", type=float, default=0.3, help="weight of each discriminator's verdict"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--salt", type=int, default=51, help="another number draws other batches and noise"
    )
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
