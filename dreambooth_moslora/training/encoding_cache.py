"""The frozen base: loading it, and what its encoders gave, in a cache.

Outputs of the frozen encoders are cached in memory or on disk by a digest of everything that they
depend on (the photo's bytes, the crop, the encoder's files). On disk, a file that does not match
its header's digest is encoded anew.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from dreambooth_moslora.base import devices, families, load, model_files
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.contents import hash_values
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import companion
from dreambooth_moslora.settings.train_config import TrainConfig

logger = logging.getLogger(__name__)

SLOW_FP32_WARNING = (
    "The base trains in fp32, which takes twice the memory and several times the time: "
    "give --mixed_precision %s."
)


def load_base(
    config: TrainConfig,
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_denoiser: bool = True,
) -> DiffusionPipeline:
    """Load the base.

    config: says how it is quantised
    base: what to load
    dtype: of its weights
    device: where it is quantised
    has_denoiser: whether that is loaded too

    Raises UserError for a base that cannot be loaded.
    """
    # SDXL's own VAE overflows in fp16. A flow model's does not, and one that is named may be
    # made for it.
    vae_dtype = dtype if base.vae or base.is_flow else torch.float32
    pipeline = load.load_pipeline(base, dtype=dtype, vae_dtype=vae_dtype, has_denoiser=has_denoiser)
    if has_denoiser:
        finish_denoiser(config, pipeline, dtype, device)

    # Pictures as prompts are never trained.
    if hasattr(pipeline, "image_encoder"):
        pipeline.register_modules(image_encoder=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def finish_denoiser(
    config: TrainConfig, pipeline: DiffusionPipeline, dtype: torch.dtype, device: torch.device
) -> None:
    """Add the companion, if there is one, to the weights, and quantise them. Raises UserError."""
    denoiser = families.get_denoiser(pipeline)
    if config.companion:
        companion.add_companion(companion.read_companion(config.companion, pipeline), denoiser)
    quantize(denoiser, config.base_quantization, dtype, device)


def warn_of_slow_precision(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Warn when a base as large as SDXL would train in fp32 on a GPU."""
    if load.get_default_resolution(pipeline) <= model_files.MAX_SMALL_BASE_PX:
        return
    kind = (device.type, families.get_denoiser(pipeline).dtype)
    if kind == ("cuda", torch.float32):
        half = devices.choose_family_precision(families.build_family(pipeline).facts)
        if half != "no":
            logger.warning(SLOW_FP32_WARNING, half)


Tensors = dict[str, torch.Tensor]
"""One value of a cache: tensors by name."""
DIGEST_FIELD = "sha256"
"""The header's field with the digest of a file's tensors."""


class EncodingCache:
    """Values by key. With a `folder`, each is kept in one safetensors file, shared between runs;
    with None, in memory. `computed` counts those that were not there."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._memory: dict[str, Tensors] = {}
        self.computed_count = 0

    def get(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """The value, from the cache or else computed and kept."""
        found = self._memory.get(key) if self.folder is None else self._read(key)
        if found is None:
            found = compute()
            self.computed_count += 1
            self._write(key, found)
        return found

    def put(self, key: str, value: Tensors) -> None:
        """Keep a value that another process has computed, unless this one has it already."""
        found = self._memory.get(key) if self.folder is None else self._read(key)
        if found is None:
            self._write(key, value)

    def _get_path(self, key: str) -> Path:
        # Two letters of the key name a folder, so that none gets too many files.
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        """The tensors on disk; None if the file is missing, unreadable, damaged or empty."""
        try:
            content = self._get_path(key).read_bytes()
            tensors = load_tensors(content)
        except (OSError, SafetensorError):
            return None

        # A file starts with the length of its header, in 8 bytes, and the header as JSON.
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        is_whole = tensors and header.get("__metadata__", {}).get(DIGEST_FIELD) == digest_tensors(
            tensors
        )
        return tensors if is_whole else None

    def _write(self, key: str, value: Tensors) -> None:
        if self.folder is None:
            self._memory[key] = value
            return

        # Written whole, so that a run beside this one reads all of it or nothing.
        self._get_path(key).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in value.items()}
        write_atomic(
            self._get_path(key), save(tensors, metadata={DIGEST_FIELD: digest_tensors(tensors)})
        )


def digest_tensors(tensors: Tensors) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


MAX_TEXTS_IN_MEMORY = 32  # That are kept in memory; a long text of FLUX.1 takes 8 MB.


class TextEmbeddingCache:
    """Prompts -> texts. Frozen encoders encode each prompt once; `release_encoders` then frees
    their memory.

    encode: computes the texts of prompts
    cache: where they are kept
    identity: all that decides an encoding, but for the prompt
    """

    def __init__(
        self,
        encode: Callable[[list[str]], list[families.TextEmbedding]],
        cache: EncodingCache,
        identity: str,
    ):
        self.encode = encode
        self.cache = cache
        self.identity = identity
        self._recent_embeddings: dict[str, families.TextEmbedding] = {}

    def __call__(self, prompts: Sequence[str]) -> list[families.TextEmbedding]:
        """The text of each prompt, from the cache or else computed."""
        for prompt in prompts:
            if prompt not in self._recent_embeddings:
                self._recent_embeddings[prompt] = self.cache.get(*self.build_entry(prompt))

        # The last ones stay in memory: every step asks for the same few, and a cache on the disk
        # would read them again.
        found = [self._recent_embeddings[prompt] for prompt in prompts]
        for prompt in list(self._recent_embeddings)[:-MAX_TEXTS_IN_MEMORY]:
            del self._recent_embeddings[prompt]
        return found

    def build_entry(self, prompt: str) -> tuple[str, Callable[[], Tensors]]:
        """The prompt's key in the cache, and the function that encodes it."""
        # "" was the key while Lumina 2's encoder was instructed before an empty prompt too
        said = prompt or None
        return hash_values(prompt=said, texts_of=self.identity), lambda: self._encode_prompt(prompt)

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> Tensors:
        (text,) = self.encode([prompt])
        return {name: tensor.cpu() for name, tensor in text.items()}

    def release_encoders(self) -> None:
        """Drop the encoders. What is not in the cache then raises UserError."""

        def raise_released(prompts: list[str]) -> list[families.TextEmbedding]:
            raise UserError(
                f"{self.cache.folder or 'the cache'}: the encoding of {prompts[0]!r:.60} cannot be "
                "read any more, and the text encoders have left memory; "
                "resume the run, which encodes it anew."
            )

        self.encode = raise_released
