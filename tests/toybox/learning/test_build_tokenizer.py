"""The toy world's tokenizer is the same, read from the files of its training or from those of a base."""

import json
from pathlib import Path

from toybox.learning.build_tokenizer import MAX_TOKENS, load

SHIPPED = Path(__file__).parents[3] / "assets" / "toy-sdxl" / "tokenizer"
TEXTS = ["a photo of a sks red robot on the beach", "two toys: an orange duck, naïve 熊 42's", "word " * 100]


def test_the_shipped_tokenizer_is_read_as_the_one_of_the_training(tmp_path):
    model = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    trained, shipped = (load(f)(TEXTS, padding="max_length", truncation=True) for f in (tmp_path, SHIPPED))
    assert trained.input_ids == shipped.input_ids and trained.attention_mask == shipped.attention_mask
    assert {len(ids) for ids in shipped.input_ids} == {MAX_TOKENS}
