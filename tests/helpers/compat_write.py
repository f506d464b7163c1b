"""Today's half of compat_old_versions.sh: published files, and the output change that each live adapter makes."""

import copy
import sys
from pathlib import Path

import torch

from benchmarks.fold_table import VARIANTS, adapt, output, small_unet
from dreambooth_moslora.adapters.published_file import publish
from dreambooth_moslora.adapters.raw_file import adapter_metadata

CASES = [("orthogonal", variant) for variant in VARIANTS] + [("kaiming", "alpha ≠ r"), ("none", "rank pattern")]


def main(folder: Path) -> None:
    base = small_unet()
    folder.mkdir(parents=True, exist_ok=True)
    before, cases = output(base), []
    for number, (kind, variant) in enumerate(CASES):
        live = adapt(copy.deepcopy(base), kind, variant)
        components = {"unet": live}
        publish(components, folder / str(number), "compat", adapter_metadata(components))
        cases.append((f"{kind}, {variant}", str(number), output(live) - before))
    generator_check = {"weights": base.state_dict(), "config": dict(base.config), "output": before, "cases": cases}
    torch.save(generator_check, folder / "wanted.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
