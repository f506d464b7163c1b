"""CLIP and DINOv2 as functions from pictures and texts to unit vectors.

By default these are openai/clip-vit-large-patch14 and facebook/dinov2-base. The embedded base has the toy
world's own: the CLIP whose text tower it uses, and a small ViT in DINOv2's format. Always fp32, so that a
picture gets the same vector in any batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from dreambooth_moslora.base.files import resolve_base
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.names import CLIP, DINO, is_toy, public_name

TOY_DINO = "toy-dino"
ALEXNET = "alexnet-owt-7be5be79.pth"
BATCH, TOKENS = 16, 77


PictureDistance = Callable[[Image.Image, Image.Image], float]


@dataclass(frozen=True)
class Clip:
    """Both halves of a CLIP model as functions to vectors (N, P), with their preprocessing."""

    embed_images: Callable[[Tensor], Tensor]
    embed_texts: Callable[[Any], Tensor]
    tokenizer: Any
    processor: Any

    @classmethod
    def of_towers(cls, vision: nn.Module, text: nn.Module, tokenizer: Any, processor: Any) -> "Clip":
        """From two towers that each have their own projection."""
        return cls(
            lambda pixels: vision(pixel_values=pixels).image_embeds,
            lambda words: text(words.input_ids, attention_mask=words.attention_mask).text_embeds,
            tokenizer,
            processor,
        )

    @classmethod
    def of_model(cls, model: CLIPModel, tokenizer: Any, processor: Any) -> "Clip":
        """From a whole CLIPModel."""

        def embed_texts(words: Any) -> Tensor:
            pooled = model.text_model(words.input_ids, attention_mask=words.attention_mask).pooler_output
            return model.text_projection(pooled)

        def embed_images(pixels: Tensor) -> Tensor:
            return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

        return cls(embed_images, embed_texts, tokenizer, processor)


@dataclass
class Encoders:
    """The models and their preprocessing. `names` are their public names, never paths.

    `lpips` is the paper's distance for diversity, if its weights are available.
    """

    clip: "Clip"
    dino: nn.Module
    dino_processor: Any
    names: tuple[str, str] = ("clip", "dino")
    batch_size: int = BATCH
    lpips: PictureDistance | None = None

    def clip_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N pictures of any size -> unit vectors (N, P), on the CPU."""
        return self._images(images, self.clip.processor, self.clip.embed_images)

    def dino_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N pictures of any size -> unit vectors (N, D) of the class token after the last layer norm, on the CPU."""
        return self._images(images, self.dino_processor, lambda x: self.dino(pixel_values=x).last_hidden_state[:, 0])

    @torch.no_grad()
    def clip_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> unit vectors (N, P), on the CPU. Texts are cut at the model's 77 tokens."""
        found = []
        for some in batches(texts, self.batch_size):
            words = self.clip.tokenizer(some, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
            vectors = self.clip.embed_texts(words.to(self.dino.device))
            found.append(normalize(vectors.float(), dim=-1).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _images(self, images: Sequence[Image.Image], processor: Any, embed) -> Tensor:
        found = []
        for some in batches(images, self.batch_size):
            pixels = processor([image.convert("RGB") for image in some], return_tensors="pt").pixel_values
            found.append(normalize(embed(pixels.to(self.dino.device)).float(), dim=-1).cpu())
        return torch.cat(found)


def batches(items: Sequence, size: int) -> list[list]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def load_encoders(
    base: str | Path = "", clip: str | Path = "", dino: str | Path = "", device: str | torch.device = "cpu"
) -> Encoders:
    """The toy world's own encoders for the embedded `base`, CLIP and DINOv2 for others, or those named by hub id or
    folder: the toy world's know only toys, and the others know none.

    Raises UserError when one is not available: give a folder, or fetch it once with a network.
    """
    folder = own_encoders(base)
    if folder and not clip:
        towers, clip_name = clip_of_pipeline(folder, device), f"{folder.name} CLIP"
    else:
        towers, clip_name = clip_of_model(clip or CLIP, device), public_name(clip or CLIP)
    dino = dino or (folder.parent / TOY_DINO if folder and (folder.parent / TOY_DINO).is_dir() else DINO)
    model = frozen(AutoModel, dino, device)
    if model.main_input_name != "pixel_values":
        raise UserError(f"the encoder {dino} is a {type(model).__name__}, which reads not only pictures: name a DINOv2")
    names = (clip_name, public_name(dino))
    lpips = None if folder else lpips_distance(device)  # AlexNet was trained on photographs, not toys
    return Encoders(towers, model, loaded(AutoImageProcessor, dino), names, lpips=lpips)


def lpips_distance(device: str | torch.device = "cpu") -> PictureDistance | None:
    """LPIPS (Zhang et al., CVPR 2018) on AlexNet; None when the `lpips` package or AlexNet's weights are missing.

    It downloads nothing.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if find_spec("lpips") is None or not weights.is_file():
        return None
    from lpips import LPIPS

    return picture_distance(LPIPS(net="alex", verbose=False).requires_grad_(False).eval().to(device), device)


def picture_distance(model: nn.Module, device: str | torch.device) -> PictureDistance:
    """A model of two pictures in [-1, 1] as a function of two pictures of one size."""

    def pixels(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].to(device) / 127.5 - 1

    return lambda a, b: float(model(pixels(a), pixels(b)))


def own_encoders(base: str | Path) -> Path | None:
    """The embedded base's folder, which has its own CLIP as the optional components of an SDXL pipeline."""
    folder = resolve_base(base) if is_toy(base) else None
    return folder if isinstance(folder, Path) and (folder / "image_encoder").is_dir() else None


def clip_of_pipeline(folder: Path, device: str | torch.device) -> Clip:
    """The CLIP inside a diffusers folder: its image encoder matches its second text encoder."""
    return Clip.of_towers(
        frozen(CLIPVisionModelWithProjection, folder / "image_encoder", device),
        frozen(CLIPTextModelWithProjection, folder / "text_encoder_2", device),
        loaded(CLIPTokenizer, folder / "tokenizer_2"),
        loaded(CLIPImageProcessor, folder / "feature_extractor"),
    )


def clip_of_model(name: str | Path, device: str | torch.device) -> Clip:
    return Clip.of_model(frozen(CLIPModel, name, device), loaded(CLIPTokenizer, name), loaded(CLIPImageProcessor, name))


def frozen(kind: Any, name: str | Path, device: str | torch.device) -> nn.Module:
    """A complete model. Raises UserError for missing weights, which transformers would initialise at random."""
    model, found = loaded(kind, name, dtype=torch.float32, output_loading_info=True)
    if lacking := sorted(found["missing_keys"]):
        raise UserError(f"the encoder {name} is no {kind.__name__}: it has no {lacking[0]}")
    return model.requires_grad_(False).eval().to(device)


def loaded(kind: Any, name: str | Path, **options) -> Any:
    """`kind.from_pretrained(name)`. Raises UserError with one line on failure."""
    try:
        return kind.from_pretrained(name, **options)
    except OSError as error:
        raise UserError(
            f"the encoder {name} cannot be loaded ({kind.__name__}): give a folder, or connect to the hub once"
        ) from error
    except Exception as error:  # files of other models may raise any error
        reason = one_line(f"{type(error).__name__} {error}")
        raise UserError(f"the encoder {name} cannot be read as a {kind.__name__}: {reason}") from error
