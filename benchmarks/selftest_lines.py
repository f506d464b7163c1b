"""Print the self-test's findings as lines of JSON, without its step of full-size SDXL, which
`gpu_step` measures.

    python -m benchmarks.selftest_lines --out FOLDER             # on a GPU: in fp32 and bf16
    python -m benchmarks.selftest_lines --out FOLDER --size small    # on the CPU, in fp32
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from dreambooth_moslora.extras.lab.selftest import CPU_ENV, SelfTest

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--size", choices=("full", "small"), default="full")
    options = options.parse_args(arguments)
    is_small = options.size == "small"
    options.out.mkdir(parents=True, exist_ok=True)
    test = SelfTest(
        options.out,
        precisions=("no",) if is_small else ("no", "bf16"),
        env=CPU_ENV if is_small else {},
        compiles=not is_small and torch.cuda.is_available(),
    )
    for finding in test.run_tests():
        print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main()
