"""From a photo to latents: the frozen base, its cached encodings, and batches on the device.

Outputs of the frozen encoders are cached in memory or on disk by a digest of everything that they depend on (the file's
bytes, the crop, the encoder's weights). A changed photo, crop or base is encoded anew, an unchanged one never again. On
disk the file's header holds a digest of the tensors; a file that does not match it is encoded anew.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from dreambooth_moslora.base import load
from dreambooth_moslora.base.families import Family, Text, denoiser_of
from dreambooth_moslora.base.files import SMALL_BASE_PX, facts_of_base
from dreambooth_moslora.base.load import default_resolution, load_denoiser, load_pipeline, quantize
from dreambooth_moslora.base.machine import has_fast_bf16
from dreambooth_moslora.core import UserError, atomic_write, content_key, file_digest
from dreambooth_moslora.photos.crops import CropPlan, CropRule, apply_crop
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import Photo, open_rgb
from dreambooth_moslora.plan.memory import uses_class_images
from dreambooth_moslora.settings.table import TrainConfig

logger = logging.getLogger(__name__)

LoadBase = Callable[[TrainConfig, torch.dtype, torch.device], DiffusionPipeline]

FP32_ON_A_GPU = (
    "The base trains in fp32, which takes twice the memory and several times the time: give --mixed_precision bf16 "
    "(fp16 on a GPU older than Ampere)."
)

BF16_ON_A_CPU = (
    "This CPU has no bf16, so PyTorch emulates it, many times slower than fp32: give --mixed_precision no, which "
    "takes twice the memory."
)


def load_base(
    config: TrainConfig, dtype: torch.dtype, device: torch.device, *, has_denoiser: bool = True
) -> DiffusionPipeline:
    """Load the base, without its denoiser if so told. Its VAE is in fp32, as SDXL's own overflows in fp16; a VAE that
    the user names is in `dtype`, and so is a flow model's, whose pipeline gives it latents in that. Raises UserError
    when it cannot be loaded."""
    facts = facts_of_base(config.pretrained_model_name_or_path, config.revision, config.cache_dir)
    is_flow = facts is not None and facts.style == "flow"
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        dtype=dtype,
        variant=config.variant,
        revision=config.revision,
        vae=config.pretrained_vae_model_name_or_path,
        cache_dir=config.cache_dir,
        vae_dtype=dtype if is_flow or config.pretrained_vae_model_name_or_path else torch.float32,
        has_denoiser=has_denoiser,
    )
    if has_denoiser:
        quantize(denoiser_of(pipeline), config.base_quantization, dtype, device)
    if hasattr(pipeline, "image_encoder"):
        pipeline.register_modules(image_encoder=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_denoiser_of(
    config: TrainConfig, pipeline: DiffusionPipeline, dtype: torch.dtype, device: torch.device
) -> None:
    """Give the pipeline of `load_base` the denoiser that it was loaded without, quantised. Raises UserError."""
    places = {"variant": config.variant, "revision": config.revision, "cache_dir": config.cache_dir}
    load_denoiser(pipeline, config.pretrained_model_name_or_path, dtype, **places)
    quantize(denoiser_of(pipeline), config.base_quantization, dtype, device)


def waits_for_encoders(config: TrainConfig) -> bool:
    """Whether the denoiser is loaded once the encoders are gone: big encoders of a flow model would not fit beside it.
    Trained encoders stay, and class images are drawn by the whole pipeline."""
    facts = facts_of_base(config.pretrained_model_name_or_path, config.revision, config.cache_dir)
    is_flow = facts is not None and facts.style == "flow"
    return is_flow and not config.keeps_text_encoders and not uses_class_images(config)


def warn_of_slow_precision(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Warn when a base as large as SDXL would train in fp32 on a GPU, or in bf16 on a CPU without it."""
    if default_resolution(pipeline) <= SMALL_BASE_PX:
        return
    if device.type == "cuda" and denoiser_of(pipeline).dtype == torch.float32:
        logger.warning(FP32_ON_A_GPU)
    if device.type == "cpu" and denoiser_of(pipeline).dtype == torch.bfloat16 and not has_fast_bf16():
        logger.warning(BF16_ON_A_CPU)


Tensors = dict[str, Tensor]
DIGEST = "sha256"


class TensorCache:
    """With a `folder`, values are kept in one safetensors file per key, shared between runs; with None, in memory."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._memory: dict[str, Tensors] = {}
        self.computed = 0

    def get(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """The value under `key`; it is computed and kept if missing."""
        found = self._memory.get(key) if self.folder is None else self._read(key)
        if found is None:
            found = compute()
            self.computed += 1
            self._keep(key, found)
        return found

    def put(self, key: str, value: Tensors) -> None:
        """Keep a value that another process has computed, unless this one has it already."""
        if key not in self._memory if self.folder is None else self._read(key) is None:
            self._keep(key, value)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        """The tensors on disk; None if the file is missing, unreadable, damaged or empty."""
        try:
            content = self._path(key).read_bytes()
            tensors = load_tensors(content)
        except (OSError, SafetensorError):
            return None
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        is_whole = tensors and header.get("__metadata__", {}).get(DIGEST) == digest_of(tensors)
        return tensors if is_whole else None

    def _keep(self, key: str, value: Tensors) -> None:
        if self.folder is None:
            self._memory[key] = value
            return
        self._path(key).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in value.items()}
        atomic_write(self._path(key), save(tensors, metadata={DIGEST: digest_of(tensors)}))


def digest_of(tensors: Tensors) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Digest of a model: names, shapes, dtype and the first 16 numbers of each weight (any training changes them)."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        head = weight.detach().flatten()[:16].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}{head.tolist()}".encode())
    return digest.hexdigest()


class PromptCache:
    """Prompts -> texts. Frozen encoders encode each prompt once; `release_encoders` then frees their memory."""

    def __init__(self, encode: Callable[[list[str]], list[Text]], cache: TensorCache, identity: str):
        self.encode, self.cache, self.identity = encode, cache, identity

    def __call__(self, prompts: Sequence[str]) -> list[Text]:
        return [self.cache.get(*self.entry(prompt)) for prompt in prompts]

    def entry(self, prompt: str) -> tuple[str, Callable[[], Tensors]]:
        """The prompt's key in the cache, and the function that encodes it."""
        return content_key(prompt=prompt, texts_of=self.identity), lambda: self._compute(prompt)

    @torch.no_grad()
    def _compute(self, prompt: str) -> Tensors:
        (text,) = self.encode([prompt])
        return {name: tensor.cpu() for name, tensor in text.items()}

    def release_encoders(self) -> None:
        """Drop the encoders. A new prompt then raises RuntimeError, an unreadable file of the cache UserError."""

        def gone(prompts: list[str]) -> list[Text]:
            if self.cache.folder is not None:
                raise UserError(
                    f"{self.cache.folder}: the encoding of {prompts[0]!r:.60} cannot be read any more, and the text "
                    "encoders have left memory; resume the run, which encodes it anew."
                )
            raise RuntimeError(f"the text encoders have left memory; {prompts} was not encoded before")

        self.encode = gone


@dataclass(frozen=True)
class EncodedView:
    """One crop of one photo: `latents` (4, h, w), `time_ids` (6,), and `mask` (1, h, w), the loss weights, or None."""

    latents: Tensor
    time_ids: Tensor
    mask: Tensor | None


class PhotoEncoder:
    """Crops and encodes photos. The VAE computes only what the cache does not hold."""

    def __init__(
        self,
        vae: nn.Module,
        cache: TensorCache | None,
        rule: CropRule,
        readers: int = 0,
        unmasked_weight: float = 0.0,
        family: Family = load.SDXL_FAMILY,
    ):
        """Without a cache, `readers` threads open and crop photos ahead of time."""
        self.vae, self.cache, self.rule, self.unmasked_weight = vae, cache, rule, unmasked_weight
        self.family = family
        self.vae_identity = fingerprint(vae)
        self._digests: dict[object, str] = {}
        self._readers = ThreadPoolExecutor(readers) if readers and cache is None else None
        self._reading: dict[tuple[Photo, CropPlan], Future[tuple[Image.Image, Image.Image | None]]] = {}

    def encode(self, photo: Photo, plan: CropPlan) -> EncodedView:
        """Its loss weights are 1 on the subject and `unmasked_weight` around it. Around a photo with transparency the
        weight is 0: its white background was not photographed."""
        tensors = self._compute(photo, plan) if self.cache is None else self.cache.get(*self.entry(photo, plan))
        around = 0.0 if photo.mask_path == photo.path else self.unmasked_weight
        weights = around + (1 - around) * tensors["subject"] if "subject" in tensors else None
        return EncodedView(tensors["latents"], torch.tensor(plan.time_ids, dtype=torch.float32), weights)

    def entry(self, photo: Photo, plan: CropPlan) -> tuple[str, Callable[[], Tensors]]:
        """The crop's key in the cache, and the function that encodes it. That raises UserError if the photo has
        changed since, or if the VAE has left memory and the disk cache cannot be read."""
        key = content_key(
            photo=self._digest(photo.path),
            subject=photo.mask_path and self._digest(photo.mask_path),
            plan=plan,
            interpolation=self.rule.interpolation,
            vae=self.vae_identity,
        )

        def compute() -> Tensors:
            if self.vae is None:
                raise UserError(
                    f"{self.cache.folder}: the encoding of {photo.path} cannot be read any more, and the VAE has left "
                    "memory; resume the run, which encodes it anew."
                )
            tensors = self._compute(photo, plan)
            for path in filter(None, (photo.path, photo.mask_path)):
                if file_digest(path) != self._digest(path):
                    raise UserError(f"{path} was changed while it was read; start again.")
            return tensors

        return key, compute

    def _digest(self, path) -> str:
        if path not in self._digests:
            self._digests[path] = file_digest(path)
        return self._digests[path]

    def read_ahead(self, photo: Photo, plan: CropPlan) -> None:
        if self._readers is not None and (photo, plan) not in self._reading:
            self._reading[photo, plan] = self._readers.submit(load_crop, photo, plan, self.rule.interpolation)

    def _compute(self, photo: Photo, plan: CropPlan) -> Tensors:
        reading = self._reading.pop((photo, plan), None)
        image, mask = reading.result() if reading else load_crop(photo, plan, self.rule.interpolation)
        latents = load.encode_image(self.vae, pixels_of(image)[None], self.family)[0].cpu()
        if mask is None:
            return {"latents": latents}
        grey = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
        return {"latents": latents, "subject": F.adaptive_avg_pool2d(grey, latents.shape[-2:])[0]}


def load_crop(photo: Photo, plan: CropPlan, interpolation: str) -> tuple[Image.Image, Image.Image | None]:
    """The photo's crop and its mask's, of the target size."""
    image, mask = apply_crop(open_rgb(photo), plan, interpolation), open_mask(photo)
    return image, None if mask is None else apply_crop(mask, plan, "bilinear")


def pixels_of(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@dataclass(frozen=True)
class TrainBatch:
    """`latents` (B, 4, h, w), `time_ids` (B, 6), `mask` (B, 1, h, w) or None, `prompts` (B), all on the CPU. The
    first `instance_count` images are the subject's, the others are prior images."""

    latents: Tensor
    time_ids: Tensor
    instance_count: int
    mask: Tensor | None
    prompts: list[str]

    def with_base_as_prior(self, prompts: list[str]) -> "TrainBatch":
        """The batch twice (2B): the second half has these prompts (B), and the base's prediction as its target."""
        size = len(self.prompts)
        return TrainBatch(
            self.latents.repeat(2, 1, 1, 1),
            self.time_ids.repeat(2, 1),
            size,
            None if self.mask is None else torch.cat([self.mask, torch.ones_like(self.mask)]),
            [*self.prompts, *prompts],
        )


def collate(samples: Sequence[tuple[EncodedView, str]], instance_count: int) -> TrainBatch:
    """One batch, the subject's views first. If only some have a mask, the others get a mask of ones."""
    views = [view for view, _ in samples]
    masks = None
    if any(view.mask is not None for view in views):
        masks = torch.stack([torch.ones_like(v.latents[:1]) if v.mask is None else v.mask for v in views])
    return TrainBatch(
        torch.stack([view.latents for view in views]),
        torch.stack([view.time_ids for view in views]),
        instance_count,
        masks,
        [caption for _, caption in samples],
    )


def move_together(tensors: dict[str, Tensor | None], device: torch.device) -> dict[str, Tensor | None]:
    """The CPU tensors, of any shapes, on `device`, by one transfer; None stays None. Only a transfer to CUDA is
    asynchronous, from pinned memory. Apple's GPUs would read a buffer that is freed. They travel as fp32, which holds
    integers up to 2**24 and all half-precision numbers exactly."""
    if device.type == "cpu":
        return tensors
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    buffer = torch.cat([tensor.reshape(-1).float() for tensor in given.values()])
    is_cuda = device.type == "cuda"
    if is_cuda:
        buffer = buffer.pin_memory()
    parts = buffer.to(device, non_blocking=is_cuda).split([tensor.numel() for tensor in given.values()])
    for part, (name, tensor) in zip(parts, given.items(), strict=True):
        given[name] = part.view(tensor.shape).to(tensor.dtype)
    return tensors | given
