"""Models that find the subject in a photo: CLIPSeg by a word, or the toy world's own net for the embedded base.

CLIPSeg (Lüddecke and Ecker, CVPR 2022) reads a word and a picture; its weights are downloaded once from the
hub. Both give a probability for each pixel. A pixel belongs to the mask if its probability is at least half of
the largest one: CLIPSeg's certainty depends more on the word than on the subject's outline. Always fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dreambooth_moslora.core.assets import assets_folder
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.names import public_name
from dreambooth_moslora.photos.masks import TOY_SEGMENTER, segmenter_name, sought_word

__all__ = ["Segmenter", "best_device", "load_segmenter", "loaded"]

LEAST_PEAK = 0.2
"""If no pixel's probability is above this, the subject was not found."""


@dataclass(frozen=True)
class Segmenter:
    """`name` is its public name, `word` what it looks for ("" for toys).

    `probabilities` takes an RGB picture (width, height) and returns fp32 (height, width) in [0, 1], on the CPU.
    """

    name: str
    word: str
    probabilities: Callable[[Image.Image], Tensor]

    def mask(self, image: Image.Image) -> Image.Image:
        """L of the picture's size: 255 on the subject, 0 elsewhere; all 0 when it was not found."""
        found = self.probabilities(image)
        peak = float(found.max())
        white = found >= peak / 2 if peak >= LEAST_PEAK else torch.zeros_like(found, dtype=torch.bool)
        return Image.fromarray(white.numpy().astype(np.uint8) * 255)


def best_device() -> torch.device:
    """The GPU of this machine, if it has one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_segmenter(config: TrainConfig, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter of `--mask_model`. The model is loaded when the first mask is made, and freed with the Segmenter.

    Raises UserError without a word; making a mask raises it when the model is missing or of another kind.
    """
    name, word = segmenter_name(config), sought_word(config)
    finder = cache(lambda: toy_finder(device) if name == TOY_SEGMENTER else clipseg_finder(name, word, device))
    return Segmenter(public_name(name), word, lambda image: finder()(image))


def toy_finder(device: torch.device | str) -> Callable[[Image.Image], Tensor]:
    from toybox.readers import segmenter

    net = segmenter.load(assets_folder() / TOY_SEGMENTER).to(device)

    def find(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        return net.logits(pixels[None].to(device))[0].sigmoid().cpu()

    return find


def clipseg_finder(name: str, word: str, device: torch.device | str) -> Callable[[Image.Image], Tensor]:
    """A function from an RGB picture (width, height) to probabilities (height, width). Raises UserError."""
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    about = {"flag": "--mask_model", "what": "CLIPSeg"}
    processor = loaded(CLIPSegProcessor, name, **about)
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, found = loaded(CLIPSegForImageSegmentation, name, **about, **options)
    if lacking := sorted(found["missing_keys"]):
        raise UserError(f"--mask_model {name} is not a CLIPSeg: it has no {lacking[0]}")
    model = model.requires_grad_(False).eval().to(device)

    def find(image: Image.Image) -> Tensor:
        inputs = processor(text=[word], images=[image], padding=True, truncation=True, return_tensors="pt")
        logits = model(**inputs.to(device)).logits
        size = (image.height, image.width)
        found = logits.view(1, 1, *logits.shape[-2:]).sigmoid()
        return interpolate(found, size=size, mode="bilinear")[0, 0].cpu()

    return find


def loaded(kind: Any, name: str, *, flag: str, what: str, **options: Any) -> nn.Module | Any:
    """`kind.from_pretrained(name)`, without running code of the repository. Raises UserError about the `flag`
    on failure."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"{flag} {name} is not here and cannot be fetched: connect to the hub once, or name a folder"
        ) from error
    except Exception as error:  # files of other models may raise any error
        reason = one_line(f"{type(error).__name__} {error}")
        raise UserError(f"{flag} {name} cannot be read as a {what}: {reason}") from error
