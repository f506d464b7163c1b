"""Changes of a base's files that make it another base, each by a few bytes."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def flip_last_bit(path: Path) -> None:
    """Change the last bit of a file, in place: of a weight file that of its last number."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_token(base: Path) -> None:
    """Give one token of the first encoder another embedding, beyond the first numbers."""
    file = base / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("token_embedding.weight")]
    tensors[name][7:] += 1
    save_file(tensors, file, {"format": "pt"})


def swap_ids(base: Path, tokenizer: str = "tokenizer_2") -> None:
    """Let two letters of a tokenizer change places."""
    file = base / tokenizer / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
