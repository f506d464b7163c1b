"""A MoSLoRA adapter that PEFT has saved, as a plain LoRA that PEFT loads without this package. For language models.

    lora_A.weight (r, in)   lora_B.up (out, r)   lora_B.mixer (r, r)   ->   lora_A.weight   lora_B.weight = B·M (out, r)

Alphas, patterns and all else of the settings stay; no base is needed.
"""

import json
from pathlib import Path

from torch import Tensor

from dreambooth_moslora.adapters.mixer import untied
from dreambooth_moslora.adapters.moslora import SAVED_TYPE
from dreambooth_moslora.adapters.raw_file import check_finite, read_tensors, write_file
from dreambooth_moslora.core import UserError, atomic_write, parse_object
from dreambooth_moslora.disk.run_folder import PEFT_CONFIG

WEIGHTS = "adapter_model.safetensors"
OWN_SETTINGS = ("mixer", "train_mixer", "mixer_seed", "mixer_factor")
UP, MIXER, WEIGHT, DOWN = ".lora_B.up", ".lora_B.mixer", ".lora_B.weight", ".lora_A.weight"
TIED = ".lora_A.tied"  # of a LoKr


def fold_peft(source: Path, out: Path) -> int:
    """Write the folder's adapter folded into `out`; returns how many layers were. Raises UserError for a folder that is
    not a MoSLoRA adapter of PEFT, a broken file, and an `out` that is the source."""
    if not (source / PEFT_CONFIG).is_file():
        raise UserError(f"{source} holds no {PEFT_CONFIG}: give the folder that PEFT's save_pretrained wrote")
    settings = parse_object((source / PEFT_CONFIG).read_bytes())
    if settings.get("peft_type") != SAVED_TYPE:
        raise UserError(f"{source} is of the type {settings.get('peft_type')!r:.40}, which PEFT loads as it is")
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out} is the adapter itself; give another folder")
    tensors, header = read_tensors(source / WEIGHTS)
    check_finite(tensors, WEIGHTS)
    modules = [key.removesuffix(UP) for key in tensors if key.endswith(UP)]
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith((UP, MIXER, TIED))}
    for module in modules:
        plain[module + DOWN], plain[module + WEIGHT] = folded(module, tensors)
    settings = {name: value for name, value in settings.items() if name not in OWN_SETTINGS} | {"peft_type": "LORA"}
    write_file(out / WEIGHTS, plain, header)
    atomic_write(out / PEFT_CONFIG, json.dumps(settings, indent=2, sort_keys=True).encode())
    return len(modules)


def folded(module: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, in) and B·M (out, r), or (r, in, h, w) and (out, r, 1, 1). Raises UserError for a broken module."""
    if (tied := tensors.get(module + TIED)) is not None:
        parts = (tied, tensors.get(module + MIXER), tensors[module + UP])
        if any(part is None or part.ndim != 2 for part in parts) or len(tied) != parts[2].shape[1]:
            raise UserError(f"{WEIGHTS} is broken: {module:.100} is not whole")
        down, mixer, up = untied(*(part.double() for part in parts))
        return down.to(tied.dtype), (up @ mixer).to(tied.dtype)
    up, mixer, down = (tensors.get(module + part) for part in (UP, MIXER, DOWN))
    if mixer is None or down is None or up.shape[1:] != mixer.shape[:1] or mixer.shape != (len(down), len(down)):
        raise UserError(f"{WEIGHTS} is broken: {module:.100} is not whole")
    product = (up.double() @ mixer.double()).to(up.dtype)
    return down, product.view(*product.shape, *(1,) * (down.ndim - 2)).contiguous()
