"""New tokens: rows of both text encoders' embedding tables that were learnt beside an adapter.

    NewTokens --attach--> both tokenizers know <s0> <s1> …, both encoders look their rows up,
                          a word stands for them
              --write_tokens--> NAME_emb.safetensors: clip_l (n, D), clip_g (n, D2), fp32

diffusers' `load_textual_inversion`, ComfyUI and A1111 read such a file. For the last two a file is
one word, so each subject of an adapter has its own. The header of the adapter beside them holds the
files' names and digests. OneTrainer keeps them in the adapter's own file.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dreambooth_moslora.disk.atomic import atomic_write
from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.disk.run_folder import tokens_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import metadata, raw_file
from dreambooth_moslora.settings.prompts import spelled, spellings_of, token_names

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

logger = logging.getLogger(__name__)

KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Component -> its tensor in the file."""
FILE_KEYS = {*KEYS.values()}
"""The tensors of a file."""
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Component -> the tokenizer that belongs to it."""
WORD = "moslora_word"
"""Key of the word in the file's header."""
UNREAD = "%s holds new tokens for %r that are not read here (%s): the word stays an ordinary one"
MISSING = (
    "%s knows %r by new tokens, and their file %s is not beside it: "
    "the word means nothing without it"
)
"""Warnings about tokens that are left out."""


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of one subject."""

    word: str  # stands for all of them in prompts
    rows: Mapping[str, Tensor]  # component -> (n, D)

    @property
    def count(self) -> int:
        """How many they are; as many for each component."""
        return len(next(iter(self.rows.values())))

    @property
    def content(self) -> bytes:
        """The file's bytes, equal for equal tokens."""
        tensors = {}
        for part, rows in self.rows.items():
            tensors[KEYS[part]] = rows.detach().float().cpu().contiguous()
        raw_file.check_finite(tensors, "the new tokens")
        return raw_file.with_sorted_metadata(save(tensors, {"format": "pt", WORD: self.word}))

    def note(self, file_name: str) -> dict[str, object]:
        """What the adapter's header says of them: the word, and which file has them."""
        digest = hashlib.sha256(self.content).hexdigest()
        return {"word": self.word, "count": self.count, "file": file_name, "sha256": digest}


class TableWithRows(nn.Module):
    """A frozen embedding table with additional `rows`, (n, D) each, whose token ids start at
    `first`."""

    def __init__(self, table: nn.Module, rows: Sequence[Tensor], first: int):
        super().__init__()
        self.table = table
        self.first = first

        # Rows that learn are parameters already. All come after the table, as a model's first
        # weight tells its dtype.
        self.own = nn.ParameterList()
        for one in rows:
            is_parameter = isinstance(one, nn.Parameter)
            self.own.append(one if is_parameter else nn.Parameter(one, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The frozen table's weight, for readers of its dtype and device."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (…) -> embeddings (…, D), in the table's dtype."""
        # Both tables are read at every place, at an id that they have, and one is chosen.
        found = self.table(ids.clamp(max=self.first - 1))
        rows = self.own[0] if len(self.own) == 1 else torch.cat(tuple(self.own))
        own = F.embedding((ids - self.first).clamp(min=0), rows).to(found.dtype)
        return torch.where((ids >= self.first)[..., None], own, found)


class AttachedTokens:
    """New tokens in use by a pipeline until `detach`: `encode_prompt` and its callers know their
    words."""

    def __init__(self, pipeline: "StableDiffusionXLPipeline", several: Sequence[NewTokens]):
        """Raises UserError for two with the same word, and for rows of another width than the
        base's."""
        words = [tokens.word for tokens in several]
        for word in words:
            if words.count(word) > 1:
                raise UserError(
                    f"two adapters have learnt tokens for the word {word!r:.40}: "
                    "use one of them at a time"
                )
        self.pipeline = pipeline
        self.several = tuple(several)
        self.spellings = spellings_of({tokens.word: tokens.count for tokens in several})
        self._tokenizers = {part: getattr(pipeline, name) for part, name in TOKENIZERS.items()}
        self._tables = {part: getattr(pipeline, part).get_input_embeddings() for part in KEYS}
        self.attach()

    def attach(self) -> None:
        """Put tokenizers and tables that know the new tokens into the pipeline."""
        for part, tokens in product(KEYS, self.several):
            if tokens.rows[part].shape[1] != self._tables[part].weight.shape[1]:
                raise UserError(
                    f"the tokens of {tokens.word!r:.40} were learnt on another base than this one"
                )

        names: list[str] = []
        for of_one in token_names(tokens.count for tokens in self.several):
            names += of_one
        for part, table in self._tables.items():
            # A copy of the tokenizer gives the names the next free ids.
            tokenizer = deepcopy(self._tokenizers[part])
            first = len(tokenizer)
            if tokenizer.add_tokens(names) != len(names):
                raise UserError(
                    f"the base's own tokenizer has {names[0]} already: "
                    "new tokens cannot be learnt on it"
                )
            setattr(self.pipeline, TOKENIZERS[part], tokenizer)

            # The table has rows for these ids. Rows that learn stay the very tensors they are.
            rows = []
            for tokens in self.several:
                own = tokens.rows[part]
                is_learnt = isinstance(own, nn.Parameter)
                rows.append(own if is_learnt else own.to(table.weight.device))
            getattr(self.pipeline, part).set_input_embeddings(TableWithRows(table, rows, first))

        # diffusers expands textual inversions there.
        self.pipeline.maybe_convert_prompt = self.spelled

    def detach(self) -> None:
        """Give the pipeline its own tokenizers and tables back."""
        vars(self.pipeline).pop("maybe_convert_prompt", None)
        for part, name in TOKENIZERS.items():
            setattr(self.pipeline, name, self._tokenizers[part])
            getattr(self.pipeline, part).set_input_embeddings(self._tables[part])

    def is_in(self, prompt: str) -> bool:
        """Whether the prompt contains one of the words, or the tokens of one."""
        if spelled(prompt, self.spellings) != prompt:
            return True
        return any(spelt in prompt for spelt in self.spellings.values())

    def spelled(self, prompt: str | list[str], tokenizer: object = None) -> str | list[str]:
        """The prompt, or each of a list, with the tokens in place of their words."""
        if isinstance(prompt, list):
            return [self.spelled(text) for text in prompt]
        return spelled(prompt, self.spellings)


def notes_of(several: Sequence[NewTokens], name: str = "moslora") -> tuple[dict[str, object], ...]:
    """What the adapter's header says about each; their files' names begin with `name`."""
    return tuple(tokens.note(tokens_name(name, number)) for number, tokens in enumerate(several))


def write_tokens(path: Path, tokens: NewTokens) -> None:
    """Write the file completely or not at all. Raises UserError for NaN and infinity."""
    atomic_write(path, tokens.content)


def read_tokens(path: Path) -> NewTokens:
    """The tokens in a file. Raises UserError for any other file."""
    tensors, header = raw_file.read_tensors(path)
    raw_file.check_finite(tensors, path.name)
    found = tokens_of(header.get(WORD, ""), tensors, path)
    if not found.word.strip():
        raise UserError(
            f"{path.name} holds no new tokens of this program: its header names no word for them"
        )
    return found


def tokens_of(word: str, tensors: Mapping[str, Tensor], path: Path) -> NewTokens:
    """The tokens of a file. Raises UserError for other tensors.

    word: stands for them
    tensors: clip_l (n, D) and clip_g (n, D2)
    path: of the file, for the message
    """
    rows = {}
    for part, key in KEYS.items():
        table = tensors.get(key)
        if table is not None and table.is_floating_point() and table.ndim == 2 and len(table):
            rows[part] = table

    # One table for each encoder, as many rows in both, and nothing else.
    counts = {len(table) for table in rows.values()}
    if rows.keys() != KEYS.keys() or len(tensors) > len(rows) or len(counts) != 1:
        raise UserError(f"{path.name} holds no new tokens: clip_l and clip_g, as many rows in each")
    return NewTokens(word, {part: table.float() for part, table in rows.items()})


def tokens_inside(path: Path, is_for_sdxl: bool = True) -> tuple[NewTokens, ...]:
    """The tokens that OneTrainer has bundled in an adapter's file. Those of another model, and of a
    word that has vectors for the encoders' outputs, are logged and left out. Raises UserError for
    broken ones."""
    found = []
    with safe_open(path, framework="pt") as opened:
        for word, names in metadata.bundled(opened.keys()).items():
            # Only rows of the two tables can be attached here.
            if not is_for_sdxl or not word.strip() or set(names) != FILE_KEYS:
                logger.warning(UNREAD, path.name, word, ", ".join(names))
                continue
            tensors = {}
            for name in FILE_KEYS:
                tensors[name] = opened.get_tensor(f"{metadata.BUNDLE}{word}.{name}")
            raw_file.check_finite(tensors, path.name)
            found.append(tokens_of(word, tensors, path))
    return tuple(found)


def tokens_beside(adapter: Path, header: Mapping[str, str]) -> tuple[NewTokens, ...]:
    """The tokens that an adapter's header names, from files beside it; a missing one is logged.
    Raises UserError."""
    found = []
    for note in metadata.notes_in(header):
        path = adapter.parent / note["file"]

        # Without its file a word is an ordinary one. With another adapter's file it would mean
        # something else: that is refused.
        if not path.is_file():
            logger.warning(MISSING, adapter.name, note["word"], path.name)
        elif file_digest(path) != note["sha256"]:
            what = f"the file of new tokens that belongs to {adapter.name}"
            raise UserError(f"{path.name} is not {what}: copy both again")
        else:
            found.append(read_tokens(path))
    return tuple(found)
