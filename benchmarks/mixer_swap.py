"""How long a subject takes to appear that is mixers alone, once their basis is loaded; and how large its file is.

    python -m benchmarks.mixer_swap [--base toy] [--rank 16] [--rounds 50]

basis    the first subject: the singular directions are computed from the base's files and put into the UNet
swap     the next ones, in turn: reading the file, checking its digest, and one copy
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from dreambooth_moslora.adapters.basis import SvdBasis, write_mixers
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_parameters, inject
from dreambooth_moslora.adapters.raw_file import adapter_metadata
from dreambooth_moslora.base.files import resolve_base
from dreambooth_moslora.base.load import load_pipeline
from dreambooth_moslora.generation.pipeline import SubjectPipeline

__all__ = ["measure", "random_mixers"]

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]


def random_mixers(base: Path, folder: Path, rank: int, targets: list[str], count: int = 2) -> list[Path]:
    """Files of `count` random subjects on the base's basis svd, on the quick start's layers."""
    unet = load_pipeline(base).unet
    inject(unet, MoSLoraConfig(r=rank, lora_alpha=rank, target_modules=targets, mixer="zero"))
    facts = replace(adapter_metadata({"unet": unet}), basis=SvdBasis(base).note)
    files = [folder / f"{number}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        with torch.no_grad():
            for name, weights in adapter_parameters(unet):
                if name.endswith(".mixer"):
                    weights.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
        write_mixers(file, unet, facts)
    return files


def measure(base: str, rank: int, rounds: int, targets: list[str]) -> dict[str, float]:
    """Seconds of the basis, milliseconds of a swap (median, longest), and kB of a file."""
    with tempfile.TemporaryDirectory() as name:
        files = random_mixers(Path(resolve_base(base)), Path(name), rank, targets)
        subject = SubjectPipeline.from_base(base)
        started = time.perf_counter()
        subject.activate(((subject.load_adapter(files[0]), 1.0),))
        found = {"basis_sec": time.perf_counter() - started, "kb": files[0].stat().st_size / 1000}
        swaps = []
        for number in range(rounds):
            file = files[(number + 1) % len(files)]
            started = time.perf_counter()
            subject.adapters.pop(file.stem, None)  # as if it were another file
            subject.activate(((subject.load_adapter(file), 1.0),))
            swaps.append(1000 * (time.perf_counter() - started))
    return found | {"swap_ms": median(swaps), "longest_ms": max(swaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="toy")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    for name, value in measure(args.base, args.rank, args.rounds, TARGETS).items():
        print(f"{name:12} {value:.2f}")


if __name__ == "__main__":
    main()
