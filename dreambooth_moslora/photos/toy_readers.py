"""Read photos by the embedded base's own networks: the toy's pixels, and its surroundings.

    # (N,3,H,W) in [-1, 1] -> (N,H,W), above 0 at toys
    load_segmenter_net(folder).compute_logits(pixels)
    # ("on the beach", "sunset")
    SurroundingsReader(folder).read(image, "duck")

The segmenter is a small U-Net (Ronneberger et al., 2015), trained on renders by
`toybox.learning.train_segmenter`. The base's own CLIP reads the surroundings, zero shot (`python -m
toybox.measures.surroundings` measures its accuracy).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate, normalize, pixel_shuffle, pixel_unshuffle
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from dreambooth_moslora.photos.pretrained import load_frozen, load_pretrained
from dreambooth_moslora.settings.toy_bases import PLACES

ENCODER_LABEL = "the encoder"
"""Name of a model that encodes images in errors."""
WEIGHTS_NAME = "model.safetensors"
TRAINING_PX = 128
"""Shorter side of its training images."""
PATCH_PX = 2
"""Side of the patches whose pixels become channels: a quarter of the work for the same outline."""
LEVEL_CHANNELS = (24, 32, 40, 48)
"""Channels of each level; each has half the sides of the one before."""
SIDE_MULTIPLE_PX = PATCH_PX * 2 ** (len(LEVEL_CHANNELS) - 1)


def _build_convolution(inputs: int, outputs: int, stride: int = 1) -> torch.nn.Sequential:
    """Return convolution, normalization and SiLU: (N, inputs, h, w) -> (N, outputs, h / stride, w /
    stride)."""
    convolution = torch.nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    return torch.nn.Sequential(convolution, torch.nn.GroupNorm(8, outputs), torch.nn.SiLU())


class ToySegmenter(torch.nn.Module):
    """Small U-Net: pixels (N,3,H,W) in [-1, 1], sides multiples of 16 -> logits (N,H,W).

    Each halving of the sides is followed by a bilinear doubling, to which the features of that size
    are added.
    """

    def __init__(self):
        super().__init__()
        pairs = list(pairwise(LEVEL_CHANNELS))
        self.stem = _build_convolution(3 * PATCH_PX**2, LEVEL_CHANNELS[0])
        self.down = torch.nn.ModuleList(
            torch.nn.Sequential(_build_convolution(a, b, 2), _build_convolution(b, b))
            for a, b in pairs
        )
        self.narrow = torch.nn.ModuleList(torch.nn.Conv2d(b, a, 1) for a, b in reversed(pairs))
        self.up = torch.nn.ModuleList(_build_convolution(a, a) for a, _ in reversed(pairs))
        self.head = torch.nn.Conv2d(LEVEL_CHANNELS[0], PATCH_PX**2, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits (N,H,W) of pixels (N,3,H,W) in [-1, 1]."""
        # Down: features of each size, from fine to coarse
        levels = [self.stem(pixel_unshuffle(pixels, PATCH_PX))]
        for down in self.down:
            levels.append(down(levels[-1]))

        # Up: each level gets the fine outline from the features on the way down.
        x = levels.pop()
        for narrow, up in zip(self.narrow, self.up):
            x = interpolate(narrow(x), scale_factor=2, mode="bilinear")
            x = up(x + levels.pop())
        return pixel_shuffle(self.head(x), PATCH_PX)[:, 0]

    @torch.no_grad()
    def compute_logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits (N,H,W) of pixels (N,3,H,W) of any size, computed with the shorter side
        scaled to about 128 px."""
        sides = pixels.shape[-2:]
        scale = TRAINING_PX / min(sides)
        input_sides = [
            max(SIDE_MULTIPLE_PX, round(side * scale / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX)
            for side in sides
        ]
        small = interpolate(pixels, size=input_sides, mode="bilinear", antialias=True)
        return interpolate(self(small)[:, None], size=sides, mode="bilinear")[:, 0]


def load_segmenter_net(folder: Path) -> ToySegmenter:
    """Return the segmenter of a folder, in fp32, whatever its file has."""
    net = ToySegmenter().eval().requires_grad_(False)
    weights = load_file(folder / WEIGHTS_NAME)
    net.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return net


LIGHT_PHRASES = {
    "day": "",
    "sunset": "at sunset",
    "night": "at night",
    "overcast": "on an overcast day",
    "fog": "in the fog",
    "rain": "in the rain",
    "snowfall": "in falling snow",
}
"""Lights of the toy world -> their phrase in a caption."""
PLACE_LIGHTS = {
    **dict.fromkeys(PLACES, tuple(LIGHT_PHRASES)),
    # Places with a lamp have day and night, but no weather.
    **dict.fromkeys(
        (
            "on a wooden floor",
            "on a purple rug",
            "on a checkered floor",
            "in a pink room",
            "in a kitchen",
        ),
        ("day", "night"),
    ),
    **dict.fromkeys(("on the beach", "on water", "on autumn leaves"), tuple(LIGHT_PHRASES)[:-1]),
    **dict.fromkeys(("on the moon", "on a stage with red curtains", "on lava"), ("day",)),
    "in the snow": ("day", "sunset", "night", "overcast", "fog", "snowfall"),
    "in the desert": ("day", "sunset", "night", "overcast"),
}
"""The places of the toy world, and the lights under which each may be shown."""
SURROUNDINGS = tuple((place, light) for place, lights in PLACE_LIGHTS.items() for light in lights)


def format_surroundings(place: str, light: str) -> str:
    """Return the end of a caption: "on the beach at sunset"; daylight adds nothing."""
    return f"{place} {LIGHT_PHRASES[light]}".strip()


@dataclass(frozen=True)
class Clip:
    """Both halves of a CLIP model as functions to vectors (N, P), with their preprocessing."""

    embed_images: Callable[[torch.Tensor], torch.Tensor]
    embed_texts: Callable[[Any], torch.Tensor]
    tokenizer: Any
    processor: Any


def load_pipeline_clip(folder: Path, device: torch.device | str = "cpu") -> Clip:
    """Load the CLIP of a pipeline's folder, in fp32: its image encoder and second text encoder.

    Raises UserError if it cannot be loaded.
    """
    # Both halves, with projected outputs
    load = partial(load_frozen, flag=ENCODER_LABEL, device=device, dtype=torch.float32)
    vision = load(CLIPVisionModelWithProjection, folder / "image_encoder")
    text = load(CLIPTextModelWithProjection, folder / "text_encoder_2")

    def embed_images(pixels: torch.Tensor) -> torch.Tensor:
        return vision(pixel_values=pixels).image_embeds

    def embed_texts(texts: Any) -> torch.Tensor:
        return text(texts.input_ids, attention_mask=texts.attention_mask).text_embeds

    # Their preprocessing
    return Clip(
        embed_images=embed_images,
        embed_texts=embed_texts,
        tokenizer=load_pretrained(CLIPTokenizer, folder / "tokenizer_2", ENCODER_LABEL),
        processor=load_pretrained(CLIPImageProcessor, folder / "feature_extractor", ENCODER_LABEL),
    )


class SurroundingsReader:
    """Zero-shot reader of place and light, by the CLIP of a diffusers folder."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.clip = load_pipeline_clip(folder, device)
        self.device = device

        # A folder's photos all show the same kind: its captions are encoded once.
        self.vectors = cache(self._embed_captions)

    def _embed_captions(self, kind: str) -> torch.Tensor:
        """Return unit vectors (S, P) of a caption for each of the S surroundings."""
        captions = [
            f"a photo of a {kind} {format_surroundings(place, light)}"
            for place, light in SURROUNDINGS
        ]
        tokens = self.clip.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        return normalize(self.clip.embed_texts(tokens.to(self.device)), dim=-1)

    @torch.no_grad()
    def read(self, image: Image.Image, kind: str = "toy") -> tuple[str, str]:
        """Return place and light of an RGB image of any size that shows a `kind`."""
        pixels = self.clip.processor(image, return_tensors="pt").pixel_values
        embedding = normalize(self.clip.embed_images(pixels.to(self.device)), dim=-1)
        return SURROUNDINGS[int((self.vectors(kind) @ embedding[0]).argmax())]
