"""What this process knows of its machine without torch: the run's processes, and which half precision a GPU is for.

bf16 where the GPU multiplies it in hardware, else fp16.
"""

import os

AMPERE = 8
"""The first compute capability of Nvidia's with bf16 convolutions and matrix products."""
AMD = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""The architectures of AMD's with matrix units for bf16: CDNA, and RDNA from the third on."""


def process_count() -> int:
    """Processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the run's first process, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def half_precision() -> str:
    """bf16 where the current GPU has it, else fp16. There must be a GPU."""
    import torch  # not before it is needed: a dry run answers at once

    if torch.version.hip:  # its compute capability is the architecture's number
        has_bf16 = torch.cuda.get_device_properties().gcnArchName.startswith(AMD)
    else:
        has_bf16 = torch.cuda.get_device_capability()[0] >= AMPERE
    return "bf16" if has_bf16 else "fp16"
