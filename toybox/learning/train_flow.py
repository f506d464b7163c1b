"""Trains a second base in the toy world: Z-Image's architecture at 9 M parameters, on cached
latents and captions.

    python -m toybox.learning.train_flow --data DATA --latents WORK/latents \
        --teacher assets/toy-sdxl --out WORK/flow --steps 4500

OUT/model is a ZImagePipeline: this transformer, a Qwen3 encoder of three layers that learns along
with it (diffusers takes the output of the last but one), a byte-level BPE of the captions, and the
teacher's autoencoder.

Rectified flow (Liu et al., 2022, arXiv 2209.03003): z = (1 - σ)·x + σ·n, and the transformer's
output is x - n, with σ drawn logit-normally (Esser et al., 2024, arXiv 2403.03206). For half of the
rows x and n are those that the teacher, a finished UNet, finds in z under the caption at the same
ratio of noise to signal: this is the expectation of x - n, without the noise of one draw. In the
last third of the run all rows learn from the data. A tenth of the captions is empty, for guidance.
Cells of a toy weigh more, as in `train_unet`.

With `--start` a finished base goes on, with its tokenizer and without a teacher, as on the latents
of a new autoencoder, which no teacher knows: `--vae` is that autoencoder.

`--compiled` wants a C++ compiler and a minute before the first step. A step takes 0.55 of the
processor's time then, as most of an eager one goes into norms, modulation and rotary embeddings,
which compilation fuses. `torchrun` shares the work, as in `train_unet`: two processes of one thread
are faster than one of two.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from toybox.assemble import compute_in_fp32, remove_origin
from toybox.data.renders import Renders
from toybox.data.sample_latents import TIME_IDS
from toybox.learning.channels_last import replace_group_norms, to_channels_last
from toybox.learning.train_clip import sample_nonsense
from toybox.learning.train_unet import (
    TextTowers,
    build_noise_schedule,
    compute_cell_weights,
    find_whole_images,
    load_latents,
    sample_caption,
)
from toybox.learning.training import MasterWeights, TrainingRun, compile_each, compute_dtype

__all__ = ["FlowTeacher", "Teacher", "build_parts", "train_tokenizer", "train"]

WIDTH, TEXT_WIDTH, VOCABULARY = 256, 128, 2000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
EMPTY = 0.1  # share of the captions
ENDS = ("embedder", "embed_tokens", "final_layer", "pad_token")  # left to AdamW


def train_tokenizer(captions: list[str]) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE, of the words of these captions. It takes every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet)
    )
    learnt = json.loads(bpe.to_str())["model"]
    vocabulary = learnt["vocab"] | {
        token: len(learnt["vocab"]) + place for place, token in enumerate(SPECIAL)
    }
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in learnt["merges"]])
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)  # each stays one token
    tokenizer.chat_template = CHAT
    return tokenizer


def build_parts(vocabulary_size: int) -> nn.ModuleDict:
    """Build the transformer (4 channels) and the encoder of a vocabulary of that size, at
    random."""
    sizes = {
        "in_channels": 4,
        "dim": WIDTH,
        "n_layers": 6,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 4,
    }
    places = {"axes_dims": [16, 24, 24], "axes_lens": [1024, 64, 64]}
    transformer = ZImageTransformer2DModel(cap_feat_dim=TEXT_WIDTH, **sizes, **places)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token, std=0.02)
    nn.init.zeros_(transformer.all_final_layer["2-1"].linear.weight)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    widths = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 3 * TEXT_WIDTH,
        "num_hidden_layers": 3,
    }
    encoder = Qwen3Model(
        Qwen3Config(vocab_size=vocabulary_size, max_position_embeddings=1024, **widths, **heads)
    )
    return nn.ModuleDict({"transformer": transformer, "text_encoder": encoder})


class RealRotary:
    """Z-Image's attention (N,S,C) with its rotary embedding in real numbers: complex ones are not
    compiled."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """`freqs_cis`: complex (N,S,head/2). `attention_mask`: bool (N,S), of the tokens that are
        there."""
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (
            to(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in projections
        )
        cos, sin = torch.view_as_real(freqs_cis)[:, None].unbind(-1)
        q, k = rotate_pairs(attn.norm_q(q), cos, sin), rotate_pairs(attn.norm_k(k), cos, sin)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, None, None], -torch.inf)
        return attn.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of neighbours in x (N,heads,S,C) by angles whose `cos` and `sin` are
    (N,1,S,C/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def install_real_rotary(transformer: ZImageTransformer2DModel) -> list[nn.Module]:
    """Its blocks, whose attention is `RealRotary` now."""
    blocks = [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]
    for block in blocks:
        block.attention.set_processor(RealRotary())
    return blocks


def encode(encoder: Qwen3Model, tokenizer: Qwen2Tokenizer, captions: list[str]) -> list[Tensor]:
    """Encode each caption to states (words,128), as the pipeline takes them."""
    messages = [[{"role": "user", "content": caption}] for caption in captions]
    texts = [
        tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        for message in messages
    ]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    states = encoder(**tokens, output_hidden_states=True).hidden_states[-2]
    return [state[mask.bool()] for state, mask in zip(states, tokens.attention_mask)]


def run_transformer(
    transformer: ZImageTransformer2DModel, z: Tensor, sigma: Tensor, states: list[Tensor]
) -> Tensor:
    """x - n (N,4,H,W) fp32 of z = (1 - σ)·x + σ·n, σ (N,)."""
    predictions = transformer(list(z[:, :, None]), 1 - sigma, states, return_dict=False)[0]
    return torch.stack(predictions)[:, :, 0].float()


class Teacher:
    """Finished UNet of the toy world, which predicts the expectation of x - n."""

    def __init__(self, base: Path):
        self.towers, self.dtype = TextTowers(base, base / "tokenizer"), compute_dtype()
        unet = UNet2DConditionModel.from_pretrained(base / "unet").eval()
        unet.set_attn_processor(AttnProcessor())
        self.unet = replace_group_norms(unet).to(
            dtype=self.dtype, memory_format=torch.channels_last
        )
        self.signal = build_noise_schedule().alphas_cumprod.sqrt()
        self.sigmas = (noise := (1 - self.signal**2).sqrt()) / (self.signal + noise)

    def find_timesteps(self, sigma: Tensor) -> Tensor:
        """Find the timesteps (N,) of its schedule whose σ is the nearest, at most the noisiest
        one's."""
        return torch.searchsorted(self.sigmas, sigma).clamp(max=len(self.sigmas) - 1)

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        """x - n (N,4,H,W) fp32, expected of the flow's z (N,4,H,W) at σ = sigmas[t] under the
        captions."""
        embeds, pooled = (
            torch.where(has_caption(captions, c.ndim), c, 0) for c in self.towers(captions)
        )
        signal, sigma = (values[t][:, None, None, None] for values in (self.signal, self.sigmas))
        ddpm_latents, noise = z * signal / (1 - sigma), (1 - signal**2).sqrt()
        added = {"text_embeds": pooled, "time_ids": torch.tensor([TIME_IDS]).repeat(len(z), 1)}
        v = self.unet(
            to_channels_last(ddpm_latents, self.dtype), t, embeds, added_cond_kwargs=added
        ).sample.float()
        return (signal * ddpm_latents - noise * v) - (noise * ddpm_latents + signal * v)


class FlowTeacher:
    """Finished transformer, the pipeline in `folder`, which predicts the velocity that a UNet
    should predict."""

    def __init__(self, folder: Path, compiled: bool = False):
        self.tokenizer, dtype = (
            Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
            compute_dtype(),
        )
        self.encoder = Qwen3Model.from_pretrained(folder / "text_encoder").eval().to(dtype)
        self.transformer = (
            ZImageTransformer2DModel.from_pretrained(folder / "transformer").eval().to(dtype)
        )
        self.signal, self.dtype = build_noise_schedule().alphas_cumprod.sqrt(), dtype
        if compiled:
            compile_each(install_real_rotary(self.transformer))

    @torch.no_grad()
    def __call__(self, noisy: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        """α·n - β·x (N,4,H,W) fp32, expected of `noisy` = α·x + β·n (N,4,H,W) at the schedule's
        steps t (N,)."""
        signal = self.signal[t][:, None, None, None]
        noise = (1 - signal**2).sqrt()
        sigma, z = noise / (signal + noise), noisy.float() / (signal + noise)
        states = encode(self.encoder, self.tokenizer, captions)
        difference = run_transformer(self.transformer, z.to(self.dtype), sigma.flatten(), states)
        return signal * (z - (1 - sigma) * difference) - noise * (z + sigma * difference)


def has_caption(captions: list[str], dimensions: int) -> Tensor:
    """Return which captions are not empty, bool (N,1,…): the UNet gets an empty one as zeros."""
    return torch.tensor([bool(caption) for caption in captions]).view(-1, *[1] * (dimensions - 1))


def load_parts(base: Path) -> tuple[Qwen2Tokenizer, nn.ModuleDict]:
    """Load the tokenizer of a finished base, and its transformer and encoder in fp32."""
    transformer = ZImageTransformer2DModel.from_pretrained(
        base / "transformer", torch_dtype=torch.float32
    )
    encoder = Qwen3Model.from_pretrained(base / "text_encoder", torch_dtype=torch.float32)
    parts = nn.ModuleDict({"transformer": transformer, "text_encoder": encoder})
    return Qwen2Tokenizer.from_pretrained(base / "tokenizer"), parts


def build_new_parts(renders: Renders) -> tuple[Qwen2Tokenizer, nn.ModuleDict]:
    """Build a tokenizer of the renders' captions, and both networks at random."""
    tokenizer = train_tokenizer(
        [row[name] for row in renders.rows for name in ("caption", "canonical_caption")]
    )
    return tokenizer, build_parts(len(tokenizer))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    renders, cache = Renders(args.data), load_latents(args.latents)
    whole_rows = find_whole_images(cache["time_ids"])
    teacher = None if args.start else Teacher(args.teacher)
    tokenizer, parts = load_parts(args.start) if args.start else build_new_parts(renders)
    parts.train()
    if args.compiled:
        compile_each(install_real_rotary(parts["transformer"]))
    weights = MasterWeights(
        parts, adamw_lr=args.lr, muon_lr=args.muon_lr, adamw_names=ENDS, ema_decay=args.ema_decay
    )
    options = {"minutes": args.minutes, "until": args.until, "batch": args.batch}
    run = TrainingRun(
        args.out, weights, args.steps, **options, save_every=50, log_every=args.log_every
    )
    for step in run:
        generator = run.seed_generator(step)
        rng = random.Random(generator.initial_seed())
        rows = whole_rows[torch.randint(len(whole_rows), (args.batch,), generator=generator)]
        captions = [
            sample_nonsense(sample_caption(renders.rows[i], rng), rng, 0.1) for i in rows.tolist()
        ]
        captions = ["" if rng.random() < EMPTY else caption for caption in captions]
        x, sigma = (
            cache["latents"][rows].float(),
            torch.randn(args.batch, generator=generator).sigmoid(),
        )
        noise = torch.randn(x.shape, generator=generator)
        taught = args.batch // 2 if teacher and run.progress <= 2 / 3 else 0
        if taught:
            # The teacher knows the noise levels of its own schedule only.
            t = teacher.find_timesteps(sigma[:taught])
            sigma[:taught] = teacher.sigmas[t]
        z = torch.lerp(x, noise, sigma[:, None, None, None])
        target = x - noise
        if taught:
            target[:taught] = teacher(z[:taught], t, captions[:taught])
        states = encode(parts["text_encoder"], tokenizer, captions)
        squared = (
            run_transformer(parts["transformer"], z.to(states[0].dtype), sigma, states) - target
        ).square()
        (loss := (squared * compute_cell_weights(cache["toys"][rows])).mean()).backward()
        norm = weights.step(run.compute_rate_factor(step, warmup=50 if args.start else 200))
        run.add(loss=loss, drawn=squared[taught:].mean(), grad_norm=norm)
    if run.rank == 0:
        export(weights, tokenizer, args.vae or args.teacher / "vae", args.out / "model")


def export(weights: MasterWeights, tokenizer: Qwen2Tokenizer, vae: Path, out: Path) -> None:
    """Write the averaged weights as a ZImagePipeline in fp16, beside the autoencoder of the
    latents."""
    parts = build_parts(len(tokenizer))
    parts.load_state_dict(weights.get_averaged())
    vae = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float16)
    vae.register_to_config(shift_factor=0.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline = ZImagePipeline(vae=vae, tokenizer=tokenizer, scheduler=scheduler, **parts.half())
    pipeline.save_pretrained(out)
    compute_in_fp32(out / "text_encoder")
    remove_origin(out)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "latents", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--teacher", type=Path, default=Path("assets/toy-sdxl"), help="the embedded base"
    )
    parser.add_argument(
        "--start", type=Path, help="a finished base of this architecture to go on from, untaught"
    )
    parser.add_argument(
        "--vae", type=Path, help="the autoencoder of the latents, the teacher's unless it is given"
    )
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument(
        "--until", type=int, help="stop at this step for now, with the rates of --steps"
    )
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument("--log_every", type=int, default=50, help="steps")
    parser.add_argument("--batch", type=int, default=64, help="batch of each process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--muon_lr", type=float, default=1e-2, help="rate of the weight matrices, by Muon"
    )
    parser.add_argument("--compiled", action="store_true", help="compile the transformer's blocks")
    parser.add_argument(
        "--ema_decay", type=float, default=0.998, help="decay of the exported, averaged weights"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
