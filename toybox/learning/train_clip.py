"""Trains the toy world's two CLIP text towers against one CLIP vision tower, contrastively, on
renders and captions.

python -m toybox.learning.train_clip --data DATA --tokenizer WORK/tokenizer --out WORK/clip --steps
3000

Each text tower has the symmetric InfoNCE loss of CLIP (Radford et al., 2021). The second tower's
projection is published; the first tower's head is dropped after training (SDXL's first text encoder
has none). Nonsense words are mixed into the captions, so that an unknown token such as `sks` does
not disturb the rest of a prompt.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from toybox.data.renders import Renders
from toybox.learning.build_tokenizer import load
from toybox.learning.training import MasterWeights, TrainingRun, compute_dtype

__all__ = ["PROJECTION", "ClipTowers", "sample_nonsense", "convert_to_clip_pixels"]

PROJECTION = 160
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def sample_nonsense(caption: str, rng: random.Random, share: float = 0.15) -> str:
    """With probability `share`, put a meaningless word of 2-4 letters before one of the caption's
    last words."""
    if rng.random() >= share:
        return caption
    letters = "bcdfghjklmnpqrstvwxz"
    word = rng.choice(
        ["sks", "ohwx", "".join(rng.choice(letters) for _ in range(rng.randint(2, 4)))]
    )
    caption_words = caption.split(" ")
    caption_words.insert(rng.randint(1, len(caption_words) - 1), word)
    return " ".join(caption_words)


def convert_to_clip_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (N,H,W,3) -> (N,3,H,W) normalised with CLIP's mean and deviation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((images.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)


def build_text_config(
    width: int, layers: int, heads: int, vocabulary: int, **extra
) -> CLIPTextConfig:
    """`vocabulary` counts the tokens; the last two are begin and end of text."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        attn_implementation="eager",
        **extra,
    )


class ClipTowers(nn.Module):
    """Both text towers and the vision tower; `forward` returns the loss and the fraction of correct
    matches in the batch."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text = CLIPTextModel(build_text_config(96, 3, 4, vocabulary, hidden_act="quick_gelu"))
        self.text_2 = CLIPTextModelWithProjection(
            build_text_config(160, 4, 4, vocabulary, projection_dim=PROJECTION)
        )
        self.vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                image_size=128,
                patch_size=16,
                hidden_size=160,
                intermediate_size=640,
                num_hidden_layers=5,
                num_attention_heads=4,
                projection_dim=PROJECTION,
                attn_implementation="eager",
            )
        )
        self.head = nn.Linear(96, PROJECTION, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([2.65, 2.65]))

    def encode_texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(N,L) token ids -> two unit vectors (N,160), of the first and the second tower."""
        first = self.head(self.text(ids).pooler_output)
        return normalize(first.float(), dim=-1), normalize(
            self.text_2(ids).text_embeds.float(), dim=-1
        )

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N,3,128,128) -> unit vectors (N,160)."""
        return normalize(self.vision(pixels).image_embeds.float(), dim=-1)

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        image = self.encode_images(pixels)
        labels = torch.arange(len(ids), device=ids.device)
        losses, right = [], []
        for text, log_scale in zip(self.encode_texts(ids), self.log_scale.float()):
            logits = log_scale.clamp(max=4.6).exp() * image @ text.T
            losses.append((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2)
            right.append((logits.argmax(1) == labels).float().mean())
        return torch.stack(losses).sum(), torch.stack(right)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift each by up to 8 px. uint8 (N,H,W,3)."""
    images = images.clone()
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images[mirrored] = images[mirrored].flip(2)
    shift = torch.randint(-8, 9, (2,), generator=generator).tolist()
    return images.roll(shift, dims=(1, 2))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    renders, tokenizer = Renders(args.data), load(args.tokenizer)
    towers = ClipTowers(len(tokenizer)).to(args.device)
    weights = MasterWeights(
        towers,
        muon_lr=0.01,
        adamw_lr=1e-3,
        adamw_names=("embedding", "projection", "head"),
        weight_decay=0.02,
        ema_decay=0.998,
    )
    run = TrainingRun(
        args.out, weights, args.steps, minutes=args.minutes, save_every=500, log_every=50
    )
    for step in run:
        generator, rng = run.seed_generator(step), random.Random(step)
        picked = renders.sample(args.batch, generator)
        texts = [sample_nonsense(renders.rows[i]["caption"], rng) for i in picked.tolist()]
        ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
        pixels = convert_to_clip_pixels(
            augment(renders.load_images(picked), generator), compute_dtype(args.device)
        )
        loss, right = towers(pixels.to(args.device), ids.to(args.device))
        loss.backward()
        norm = weights.step(run.compute_rate_factor(step))
        run.add(loss=loss, right_1=right[0], right_2=right[1], grad_norm=norm)
    export(weights, renders, tokenizer, args.out)


@torch.no_grad()
def measure_retrieval(
    towers: ClipTowers, renders: Renders, tokenizer, candidates: int = 100
) -> list[float]:
    """Fraction of held-back renders whose own caption is nearest among `candidates`; for the first
    and second tower."""
    right = torch.zeros(2)
    groups = [
        range(i, i + candidates) for i in range(len(renders) - 1000, len(renders), candidates)
    ]
    for group in groups:
        ids = tokenizer(
            [renders.rows[i]["caption"] for i in group], padding=True, return_tensors="pt"
        ).input_ids
        image = towers.encode_images(convert_to_clip_pixels(renders.load_images(group)))
        hits = [
            (image @ t.T).argmax(1) == torch.arange(candidates) for t in towers.encode_texts(ids)
        ]
        right += torch.stack(hits).float().mean(1)
    return [round(float(v), 4) for v in right / len(groups)]


def export(weights: MasterWeights, renders: Renders, tokenizer, out: Path) -> None:
    """Averaged weights as the pipeline's components text_encoder, text_encoder_2 and
    image_encoder."""
    towers = ClipTowers(len(tokenizer)).eval()
    towers.load_state_dict(weights.get_averaged(), strict=False)
    scores = measure_retrieval(towers, renders, tokenizer)
    parts = {
        "text_encoder": towers.text,
        "text_encoder_2": towers.text_2,
        "image_encoder": towers.vision,
    }
    for name, model in parts.items():
        model.half().save_pretrained(out / "model" / name)
    size = {"height": 128, "width": 128}
    CLIPImageProcessor(
        size={"shortest_edge": 128}, crop_size=size, image_mean=MEAN, image_std=STD
    ).save_pretrained(out / "model" / "feature_extractor")
    report = {
        "retrieval_at_1_of_100": scores,
        "parameters": {
            n: sum(p.numel() for p in m.parameters()) for n, m in towers.named_children()
        },
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(report)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="stop, and let the rates fall, by the clock")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
