"""Trains the toy world's AutoencoderKL: factor 8, 4 latent channels, no attention, on random crops.

    python -m toybox.learning.train_vae --data DATA --out WORK/vae --steps 9000

Loss: |x - y| + |∇x - ∇y| / 2 + 8·(x - y)² + a small KL term, on renders and some dead-leaves
pictures. Resumable. The averaged weights are written to OUT/model, with the scaling factor that
gives latents unit variance. With --start it continues from a finished autoencoder. Once there is a
UNet, `toybox.learning.sharpen_decoder` finishes the decoder.

`--latent_noise 0.35` trains both halves on latents with white noise, as in l-DeTok (Yang et al.,
2025, arXiv 2507.15856): a denoiser's small errors then cost less of the picture. The noise is a
share of the latents' deviation, and the gradient goes through that deviation: else the encoder
would only enlarge its latents. The report tells the PSNR under noise.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from toybox.data.dead_leaves import generate_dead_leaves
from toybox.data.renders import Renders, to_pixels, to_uint8
from toybox.learning.channels_last import replace_group_norms, to_channels_last
from toybox.learning.training import MasterWeights, TrainingRun

CHANNELS = (32, 64, 128, 128)
KL_WEIGHT = 3e-6
LEAVES_SHARE = 0.06
CANDIDATES = 3
CHECKED_COUNT = 400  # held-back renders for the printed PSNR
NOISE_LEVELS = (0.2, 0.3)  # of the latents' deviation, at which it is printed too
RATES = {
    "muon_lr": 0.02,
    "adamw_lr": 2e-3,
    "adamw_names": ("conv_in", "conv_out", "quant_conv"),
    "ema_decay": 0.998,
}
"""Arguments of `MasterWeights`."""


def build_vae(**extra) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
        mid_block_add_attention=False,
        **extra,
    )


def sample_crops(images: Tensor, size_px: int, generator: torch.Generator) -> Tensor:
    """uint8 (N,H,W,3) -> pixels (N,3,size,size): a random crop and mirroring of each; one call in
    six also permutes colours.

    The crop is the most detailed one of `CANDIDATES`: a plain sky teaches little.
    """
    n, h, w, _ = images.shape
    top, left_px = (
        torch.randint(0, s - size_px + 1, (n, CANDIDATES), generator=generator) for s in (h, w)
    )
    crops = []
    for image, tops, lefts in zip(images, top, left_px):
        for t, k in zip(tops, lefts):
            crops.append(image[t : t + size_px, k : k + size_px])
    some = torch.stack(crops).view(n, CANDIDATES, size_px, size_px, 3)
    picked = some[torch.arange(n), measure_detail(some).argmax(1)]
    pixels = to_pixels(picked)
    mirrored = torch.rand(n, generator=generator) < 0.5
    pixels[mirrored] = pixels[mirrored].flip(-1)
    if torch.rand((), generator=generator) < 1 / 6:
        pixels = pixels[:, torch.randperm(3, generator=generator)]
    return pixels


def measure_detail(images: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels, uint8 (...,H,W,3) -> (...)."""
    x = images[..., ::2, ::2, 1].float()
    return x.diff(dim=-1).abs().mean((-2, -1)) + x.diff(dim=-2).abs().mean((-2, -1))


def compute_reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """Compute the loss of pictures (N,3,H,W): L1 of pixels, half the L1 of differences to the right
    and lower neighbours, and eight times the squared error.

    Errors here are near 0.1, where the squared term has as much gradient as the others: PSNR
    without blur.
    """
    d = (x - y).float()
    edges = d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
    return d.abs().mean() + 0.5 * edges + 8 * d.square().mean()


def add_random_noise(latents: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Latents (N,C,H,W) with white noise: each with a share of the deviation of all, from none for
    a fifth of them up to `most`."""
    share = (1.25 * torch.rand(len(latents), 1, 1, 1, generator=generator) - 0.25).clamp(
        min=0
    ) * most
    noise = share * torch.randn(latents.shape, generator=generator)
    return latents + latents.float().std() * noise.to(latents.device)


def sample_batch(
    renders: Renders, leaves: Tensor, count: int, crop_px: int, generator: torch.Generator
) -> Tensor:
    n_leaves = max(1, round(count * LEAVES_SHARE))
    images = renders.load_images(renders.sample(count - n_leaves, generator))
    extra = leaves[torch.randint(len(leaves), (n_leaves,), generator=generator)]
    return torch.cat(
        [sample_crops(images, crop_px, generator), sample_crops(extra, crop_px, generator)]
    )


def train(args: argparse.Namespace) -> AutoencoderKL:
    torch.manual_seed(0)
    renders = Renders(args.data)
    leaves = torch.from_numpy(generate_dead_leaves(300, 128, seed=5))
    vae = (
        AutoencoderKL.from_pretrained(args.start, torch_dtype=torch.float32)
        if args.start
        else build_vae()
    )
    weights = MasterWeights(replace_group_norms(vae).to(args.device), **RATES)
    run = TrainingRun(
        args.out, weights, args.steps, minutes=args.minutes, save_every=100, log_every=50
    )
    for step in run:
        generator = run.seed_generator(step, salt=args.salt)
        x = to_channels_last(
            sample_batch(renders, leaves, args.batch, args.crop_px, generator).to(args.device)
        )
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(
            posterior.mean.shape, generator=generator
        ).to(x)
        y = vae.decode(to_channels_last(add_random_noise(z, args.latent_noise, generator))).sample
        kl = posterior.kl().float().mean()
        loss = compute_reconstruction_loss(x, y) + KL_WEIGHT * kl
        loss.backward()
        norm = weights.step(args.rate * run.compute_rate_factor(step))
        run.add(loss=loss, mse=(x - y).float().square().mean(), kl=kl, grad_norm=norm)
    return export(weights.get_averaged(), renders, args.out)


@torch.no_grad()
def export(
    state: dict[str, Tensor], renders: Renders, out: Path, scaling: float | None = None
) -> AutoencoderKL:
    """Write the weights as a diffusers folder, with `scaling` or the factor of unit variance on
    held-back renders; print the PSNR."""
    vae = build_vae()
    vae.load_state_dict(state)
    x = to_pixels(renders.load_images(range(len(renders) - CHECKED_COUNT, len(renders))))
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(50)])
    noise = z.std() * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    decoded = {share: decode_latents(vae, z + share * noise) for share in (0, *NOISE_LEVELS)}
    psnr = {
        share: 10 * torch.log10(4 / (x - y).square().mean(dim=(1, 2, 3)))
        for share, y in decoded.items()
    }
    vae.register_to_config(scaling_factor=scaling or round(1 / float(z.std()), 4))
    vae.half().save_pretrained(out / "model")
    report = {
        "psnr_db": round(float(psnr[0].mean()), 2),
        "psnr_db_p10": round(float(psnr[0].quantile(0.1)), 2),
        **{
            f"psnr_db_at_noise_{share}": round(float(psnr[share].mean()), 2)
            for share in NOISE_LEVELS
        },
        "latent_mean": [round(float(v), 3) for v in z.mean(dim=(0, 2, 3))],
        "latent_std": [round(float(v), 3) for v in z.std(dim=(0, 2, 3))],
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(report)
    _draw_comparison(x[:16], decoded[0][:16], out / "reconstructions.png")
    return vae


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Unscaled latents (N,4,H/8,W/8) -> pixels (N,3,H,W) in [-1, 1]."""
    return torch.cat([vae.decode(part).sample for part in latents.split(50)]).clamp(-1, 1)


def _draw_comparison(x: Tensor, y: Tensor, path: Path) -> None:
    """Originals above their reconstructions, eight in a row."""
    from PIL import Image

    rows = [
        torch.cat(list(to_uint8(part)), dim=1)
        for a, b in zip(x.split(8), y.split(8))
        for part in (a, b)
    ]
    Image.fromarray(torch.cat(rows, dim=0).numpy()).save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop_px", type=int, default=64)
    parser.add_argument("--start", type=Path, help="a finished autoencoder to go on from")
    parser.add_argument(
        "--salt", type=int, default=0, help="another number draws other batches and noise"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument(
        "--latent_noise", type=float, default=0.0, help="most noise, in deviations of the latents"
    )
    parser.add_argument("--device", default="cpu")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
