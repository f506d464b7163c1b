"""Trains the byte-level BPE of the toy world on captions, in CLIPTokenizer's format.

    python -m toybox.learning.build_tokenizer --data DATA --out WORK/tokenizer

All 256 bytes are in the vocabulary, alone and at a word's end, so every prompt is accepted. `sks`
is one token, which the captions use only as a meaningless word (see `train_clip.nonsense`).
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from toybox.data.renders import Renders

__all__ = ["BOS", "EOS", "MAX_TOKENS", "build", "load"]

BOS, EOS, END = "<|startoftext|>", "<|endoftext|>", "</w>"
MAX_TOKENS = 77
RARE_WORDS = ("sks", "ohwx")
WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def train_merges(texts: list[str], merges: int) -> list[tuple[str, str]]:
    """Return the pairs that BPE merges, in order."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix=END,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    pairs = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in pairs]


def build_rare_merges(merges: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merges that make each rare word one token, appended after the learnt ones."""
    added = []
    for word in RARE_WORDS:
        pieces = [*word[:-1], word[-1] + END]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges and pair not in added:
                added.append(pair)
            pieces = ["".join(pair), *pieces[2:]]
    return added


def build(texts: list[str], out: Path, merges: int = 900) -> CLIPTokenizer:
    """Write vocab.json and merges.txt to `out` and return the tokenizer."""
    pairs = train_merges(texts, merges)
    pairs += build_rare_merges(set(pairs))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + END for c in alphabet), *("".join(p) for p in pairs)]
    tokens = [*dict.fromkeys(tokens), BOS, EOS]
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(p) for p in pairs)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = load(out)
    tokenizer.save_pretrained(out)
    return tokenizer


def load(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer of a folder that `build` wrote, or of a base, which has tokenizer.json
    alone."""
    if not (folder / "vocab.json").is_file():
        return CLIPTokenizer.from_pretrained(folder)
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_TOKENS,
        pad_token=EOS,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    tokenizer = build([row["caption"] for row in Renders(args.data).rows], args.out)
    print(
        len(tokenizer),
        "tokens;",
        tokenizer.tokenize("a photo of a sks red robot on the beach, naïve 熊"),
    )


if __name__ == "__main__":
    main()
