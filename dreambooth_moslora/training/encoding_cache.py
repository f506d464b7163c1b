"""Cache of the frozen encoders' outputs.

Outputs of the frozen encoders are cached in memory or on disk by a digest of everything that they
depend on (the photo's bytes, the crop, the encoder's files). On disk, a file that does not match
its header's digest is encoded anew.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from dreambooth_moslora.base import families
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.contents import hash_values
from dreambooth_moslora.disk.safetensors_header import METADATA_NAME, split_content
from dreambooth_moslora.errors import UserError

Tensors = dict[str, torch.Tensor]
"""One value of a cache: tensors by name."""
DIGEST_FIELD = "sha256"
"""The header's field with the digest of a file's tensors."""


class EncodingCache:
    """Encoder outputs by key. With a `folder`, each is kept in one safetensors file, shared between
    runs; with None, in memory. `computed_count` counts those that were missing."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._memory: dict[str, Tensors] = {}
        self.computed_count = 0

    def get(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return the value from the cache, or compute and keep it."""
        tensors = self._memory.get(key) if self.folder is None else self._read(key)
        if tensors is None:
            tensors = compute()
            self.computed_count += 1
            self._write(key, tensors)
        return tensors

    def put(self, key: str, value: Tensors) -> None:
        """Keep a value that another process has computed, unless this one has it already."""
        cached = self._memory.get(key) if self.folder is None else self._read(key)
        if cached is None:
            self._write(key, value)

    def _get_path(self, key: str) -> Path:
        # Two letters of the key name a folder, so that none gets too many files.
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        """Return the tensors on disk; None if the file is missing, unreadable, damaged or empty."""
        try:
            content = self._get_path(key).read_bytes()
            tensors = load_tensors(content)
        except (OSError, SafetensorError):
            return None

        # The digest in its metadata shows whether the file is as it was written.
        header, _ = split_content(content)
        digest = header.get(METADATA_NAME, {}).get(DIGEST_FIELD)
        return tensors if tensors and digest == digest_tensors(tensors) else None

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


MAX_TEXTS_IN_MEMORY = 32
"""Text embeddings that are kept in memory; a long prompt's of FLUX.1 takes 8 MB."""


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
        """Return the text embedding of each prompt, from the cache or computed."""
        for prompt in prompts:
            if prompt not in self._recent_embeddings:
                self._recent_embeddings[prompt] = self.cache.get(*self.build_entry(prompt))

        # The last ones stay in memory: every step asks for the same few, and a cache on the disk
        # would read them again.
        text_embeddings = [self._recent_embeddings[prompt] for prompt in prompts]
        for prompt in list(self._recent_embeddings)[:-MAX_TEXTS_IN_MEMORY]:
            del self._recent_embeddings[prompt]
        return text_embeddings

    def build_entry(self, prompt: str) -> tuple[str, Callable[[], Tensors]]:
        """Return the prompt's key in the cache, and the function that encodes it."""
        # "" was the key while Lumina 2's encoder was instructed before an empty prompt too
        main_prompt = prompt or None
        return hash_values(prompt=main_prompt, texts_of=self.identity), lambda: self._encode_prompt(
            prompt
        )

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
