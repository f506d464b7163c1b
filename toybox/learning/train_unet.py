"""Trains the toy world's UNet: SDXL's topology, shrunk, on cached latents and the frozen text
towers.

    python -m toybox.learning.train_unet --data DATA --latents WORK/latents.safetensors \
        --clip WORK/clip/model --tokenizer WORK/tokenizer --out WORK/unet --steps 12000

It predicts velocity (Salimans and Ho, 2022) on SDXL's schedule (scaled linear betas, 0.00085 to
0.012): noise prediction hardly weighs the noisiest steps, which decide the toy, and learns them far
more slowly. A tenth of the captions is dropped to zero embeddings for classifier-free guidance (Ho
and Salimans, 2022). Cells of a toy weigh four times as much as those of the ground, which are many
and learnt first; the optimum is the same. In the first half the middle block also learns the CLIP
vision tower's features (`toybox.learning.alignment`), unless the run starts from a finished UNet,
which knows them. Such a UNet learns its prediction without a caption from its own with one.

Where it computes in fp32, 3×3 convolutions are Winograd's (`toybox.learning.winograd`).

`--compiled` compiles the transformer blocks, for a C++ compiler and half a minute before the first
step: their passes take 0.86 of the processor's time then. Compiled residual blocks would be slower.
"""

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from toybox.data.renders import Renders
from toybox.learning.alignment import Alignment
from toybox.learning.build_tokenizer import load
from toybox.learning.channels_last import replace_group_norms, to_channels_last
from toybox.learning.train_clip import PROJECTION, sample_nonsense
from toybox.learning.training import MasterWeights, TrainingRun, compile_each, compute_dtype
from toybox.learning.winograd import replace_convolutions

__all__ = [
    "TextTowers",
    "build_averaged_unet",
    "build_unet",
    "build_noise_schedule",
    "parse",
    "train",
]

TIME_WIDTH = 32
SNR_GAMMA = 5.0
ALIGNMENT_WEIGHT = 0.1
ENDS = ("conv_in", "conv_out", "time_embedding", "add_embedding", "alignment")  # left to AdamW
HELD_OUT_COUNT = 1000  # images at the end, not drawn unless `--held_back` says otherwise
TEACHER_SHARE = 2 / 3
TOY_WEIGHT = 3.0  # added to a cell's weight of 1, times the share of the cell that a toy covers


def build_unet() -> UNet2DConditionModel:
    """Build a UNet of SDXL's topology, at random."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 6),
        layers_per_block=1,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + PROJECTION,
        cross_attention_dim=96 + PROJECTION,
    )


def build_noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
    )


class TextTowers:
    """Both frozen text towers: captions -> (embeds (N,77,256), pooled (N,160)), as SDXL takes
    them."""

    def __init__(self, clip: Path, tokenizer: Path, device: str = "cpu"):
        dtype = compute_dtype(device)
        self.tokenizer = load(tokenizer)
        self.device = device
        self.first = CLIPTextModel.from_pretrained(clip / "text_encoder").eval().to(device, dtype)
        self.second = (
            CLIPTextModelWithProjection.from_pretrained(clip / "text_encoder_2")
            .eval()
            .to(device, dtype)
        )
        self._known: dict[str, tuple[Tensor, Tensor]] = {}  # 40 kB a caption

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        new = sorted(set(captions) - self._known.keys())
        if new:
            self._known.update(zip(new, zip(*self._encode(new))))
        embeds, pooled = zip(*(self._known[caption] for caption in captions))
        return torch.stack(embeds), torch.stack(pooled)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        ids = ids.to(self.device)
        first = self.first(ids, output_hidden_states=True)
        second = self.second(ids, output_hidden_states=True)
        return torch.cat(
            [first.hidden_states[-2], second.hidden_states[-2]], dim=-1
        ), second.text_embeds


def drop_captions(
    embeds: Tensor, pooled: Tensor, generator: torch.Generator, share: float = 0.1
) -> Tensor:
    """Set a fraction of the conditions to zero, as the pipeline does for a missing negative prompt.
    In place.

    Returns which ones, bool (N,).
    """
    dropped = (torch.rand(len(embeds), generator=generator) < share).to(embeds.device)
    embeds[dropped] = 0
    pooled[dropped] = 0
    return dropped


@torch.no_grad()
def compute_captioned_velocity(
    unet: UNet2DConditionModel,
    noisy: Tensor,
    t: Tensor,
    embeds: Tensor,
    pooled: Tensor,
    time_ids: Tensor,
) -> Tensor:
    """Predict with captions, (N,4,H,W) fp32: a target for the UNet's prediction without.

    If the UNet is right, both targets have the same expectation, and this one has far less noise.
    Guidance multiplies the difference of the two predictions, and with it their errors.
    """
    added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.compiler.set_stance("force_eager"):  # their number differs from step to step
        return unet(noisy, t, embeds, added_cond_kwargs=added).sample.float()


def compute_edm_density(snr: Tensor) -> Tensor:
    """EDM's choice of noise levels (Karras et al., 2022, table 1) on a schedule of these SNR (T,),
    of mean 1: with a data deviation of 0.5, ln SNR is normal with mean 1 and deviation 2.4."""
    level = snr.log()
    density = torch.exp(-(((level - 1) / 2.4) ** 2) / 2) * -torch.gradient(level)[0]
    return density / density.mean()


class TimestepSampler:
    """Draw timesteps in proportion to the loss weight: p(t) ∝ max(w(t), 1/4), spread evenly over a
    batch.

    w(t) = min(SNR, gamma) / SNR weighs the error of the velocity, so that nearly clean latents,
    whose error is texture, do not dominate. A share `detail` of w is EDM's density instead, which
    gives more to low noise, where edges and small parts are decided: at 0.5, timesteps below 150
    have 24 % of the weight, else 7 %. The weights returned with a draw are w / p.
    """

    def __init__(self, schedule: DDPMScheduler, gamma: float = SNR_GAMMA, detail: float = 0.0):
        snr = compute_snr(schedule, torch.arange(len(schedule.alphas_cumprod)))
        weight = (1 - detail) * snr.clamp(max=gamma) / snr + detail * compute_edm_density(snr)
        density = weight.clamp(min=0.25)
        self.cumulative = (density / density.sum()).cumsum(0)
        self.weight = weight / (density / density.mean())

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (N,), long, and their weights (N,)."""
        level = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        t = torch.searchsorted(self.cumulative, level).clamp(max=len(self.cumulative) - 1)
        return t, self.weight[t]


def compute_cell_weights(toys: Tensor) -> Tensor:
    """Fraction of each cell that a toy covers (N,16,16) -> weights (N,1,16,16), of mean 1 over the
    batch."""
    weights = 1 + TOY_WEIGHT * toys.float()[:, None]
    return weights / weights.mean()


def load_latents(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file by `toybox.data.cache_latents`, or of all such files in a folder,
    in their names' order."""
    pieces = [
        load_file(piece)
        for piece in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def find_whole_images(time_ids: Tensor) -> Tensor:
    """Find the rows of whole renders, (M,) of time ids (N,6): Z-Image gets no crop as a
    condition."""
    return ((time_ids[:, :2] % 128 == 0) & (time_ids[:, 2:4] == 0)).all(dim=1).nonzero().flatten()


def train(
    args: argparse.Namespace,
    after: Callable[[int, Callable[[], UNet2DConditionModel]], None] | None = None,
    teacher: Callable[[Tensor, Tensor, list[str]], Tensor] | None = None,
) -> None:
    """`after` is called after each step with the number of steps that are done and a function that
    makes a UNet of the averaged weights. `teacher` tells the velocities to be expected for noisy
    latents, timesteps and captions: in the first two thirds of the run, half of the batch learns
    them instead of the noise of one draw."""
    torch.manual_seed(0)
    renders, cache = Renders(args.data), load_latents(args.latents)
    towers, schedule = (
        TextTowers(args.clip, args.tokenizer, device=args.device),
        build_noise_schedule(),
    )
    timesteps = TimestepSampler(schedule, args.snr_gamma, args.detail)
    begin = partial(UNet2DConditionModel.from_pretrained, args.start, torch_dtype=torch.float32)
    unet = begin() if args.start else build_unet()
    unet.train().set_attn_processor(AttnProcessor())
    replace_convolutions(replace_group_norms(unet), args.device)
    if args.compiled:
        compile_each(
            module for module in unet.modules() if isinstance(module, BasicTransformerBlock)
        )
    alignment = Alignment(unet, cache["seen"])
    trained = nn.ModuleDict({"unet": unet, "alignment": alignment}).to(args.device)
    weights = MasterWeights(
        trained, adamw_lr=args.lr, muon_lr=args.muon_lr, adamw_names=ENDS, ema_decay=args.ema_decay
    )
    options = {"minutes": args.minutes, "until": args.until, "batch": args.batch}
    run = TrainingRun(
        args.out, weights, args.steps, **options, save_every=100, log_every=args.log_every
    )
    for step in run:
        generator = run.seed_generator(step, salt=args.salt)
        rng = random.Random(generator.initial_seed())
        rows = torch.randint(
            len(cache["latents"]) - args.held_back, (args.batch,), generator=generator
        )
        captions = [
            sample_nonsense(sample_caption(renders.rows[i], rng), rng, 0.1) for i in rows.tolist()
        ]
        conditions = towers(captions)
        embeds, pooled = (c.clone() for c in conditions)
        dropped = drop_captions(embeds, pooled, generator, args.drop)
        some = {name: values[rows].to(args.device) for name, values in cache.items()}
        x = some["latents"].float()
        noise = torch.randn(x.shape, generator=generator).to(args.device)
        t, weight = (v.to(args.device) for v in timesteps.sample(len(x), generator))
        noisy = to_channels_last(schedule.add_noise(x, noise, t))
        added = {"text_embeds": pooled, "time_ids": some["time_ids"].float()}
        velocity = schedule.get_velocity(x, noise, t)
        taught = find_whole_images(some["time_ids"])[: args.batch // 2]
        if teacher and run.progress < TEACHER_SHARE and len(taught):
            velocity[taught] = teacher(
                noisy[taught], t[taught], [captions[i] for i in taught.tolist()]
            )
        if args.start and dropped.any():
            dropped_inputs = [v[dropped] for v in (noisy, t, *conditions, added["time_ids"])]
            velocity[dropped] = compute_captioned_velocity(unet, *dropped_inputs)
        prediction = unet(noisy, t, embeds, added_cond_kwargs=added).sample
        squared = (prediction.float() - velocity).square() * compute_cell_weights(some["toys"])
        error = squared.mean(dim=(1, 2, 3))
        loss = (error * weight).mean()
        aligned = alignment.compute_loss(some["seen"])
        share = 0 if args.start or run.progress > 0.5 else ALIGNMENT_WEIGHT
        (loss + share * aligned).backward()
        norm = weights.step(run.compute_rate_factor(step, warmup=200, decay=args.decay))
        run.add(loss=loss, mse=error.mean(), aligned=aligned, grad_norm=norm)
        if after:
            after(step + 1, partial(build_averaged_unet, unet, weights))
    if run.rank == 0:
        export(build_averaged_unet(unet, weights), args.out)


def sample_caption(row: dict, rng: random.Random) -> str:
    """Return the canonical caption in three of ten draws, else the varied one."""
    return row["canonical_caption"] if rng.random() < 0.3 else row["caption"]


def build_averaged_unet(unet: UNet2DConditionModel, weights: MasterWeights) -> UNet2DConditionModel:
    """Another UNet of the same shape, with the averaged weights, fp32."""
    averaged = UNet2DConditionModel.from_config(unet.config)
    values = weights.get_averaged().items()
    averaged.load_state_dict(
        {k.removeprefix("unet."): v for k, v in values if k.startswith("unet.")}
    )
    return averaged


def export(unet: UNet2DConditionModel, out: Path) -> None:
    """Write a diffusers folder OUT/model, fp16, and OUT/report.json."""
    unet.half().save_pretrained(out / "model")
    report = {"parameters": sum(p.numel() for p in unet.parameters())}
    (out / "report.json").write_text(json.dumps(report) + "\n", encoding="utf-8")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "latents", "clip", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument(
        "--until", type=int, help="stop at this step for now, with the rates of --steps"
    )
    parser.add_argument(
        "--held_back", type=int, default=HELD_OUT_COUNT, help="pictures at the end, never drawn"
    )
    parser.add_argument("--log_every", type=int, default=50, help="steps")
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument("--batch", type=int, default=32, help="batch of each process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--muon_lr", type=float, help="rate of the weight matrices, by Muon instead of AdamW"
    )
    parser.add_argument(
        "--drop", type=float, default=0.1, help="share of captions that are dropped, for guidance"
    )
    parser.add_argument(
        "--decay",
        type=float,
        default=0.4,
        help="last share of the run, in which the rate falls to 0",
    )
    parser.add_argument(
        "--ema_decay", type=float, default=0.999, help="decay of the exported, averaged weights"
    )
    parser.add_argument(
        "--snr_gamma", type=float, default=SNR_GAMMA, help="a larger one weighs fine detail more"
    )
    parser.add_argument(
        "--detail",
        type=float,
        default=0.0,
        help="share of the loss with EDM's weight of noise levels",
    )
    parser.add_argument("--start", type=Path, help="a finished UNet to go on from")
    parser.add_argument("--compiled", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--salt", type=int, default=1, help="another number draws other batches and noise"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    train(parse(argv))


if __name__ == "__main__":
    main()
