"""What this machine's GPU can do: its free memory, and whether it computes bf16. And which of a
launcher's processes this is. PyTorch is imported only when asked.

Nvidia's GPUs compute bf16 since Ampere (compute capability 8.0), and CPUs with AVX-512, AMX or
Arm's bf16. On older GPUs PyTorch emulates bf16, and cuDNN has no convolutions in it; on other CPUs
it is many times slower than fp32.
"""

import os
import shutil
import subprocess
import sys
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.precision import choose_half_precision
from dreambooth_moslora.settings.family_facts import FamilyFacts
from dreambooth_moslora.settings.train_config import TrainConfig

GIB = 2**30
"""Bytes in a GiB."""
CONTEXT_GIB = 0.5  # Memory of the CUDA context of a process, beside its tensors.
ENCODER_BYTES_PER_PIXEL = 2600
"""Peak of SDXL's fp32 VAE encoder beside its weights, per pixel of the photo."""
TILES_PX = (512, 256)
"""Sides of the tiles if the whole picture does not fit; the largest that does is taken."""

OUTPUTS_PER_BLOCK = 32
"""Outputs that the 4-bit kernels for CPUs compute at a time. It divides every width of SDXL."""
RESIDENT_BLOCKS = 2
"""Blocks on the device where blocks are streamed: the one that computes, and the next on its way.
"""


def get_world_size() -> int:
    """Processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def get_local_world_size() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_world_size()))


def is_main_process() -> bool:
    """Whether this is the run's first process, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def get_best_device() -> Any:
    """The GPU of Nvidia or AMD, else Apple's, else the CPU: what training, pictures and the doctor
    use."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_on_apple() -> bool:
    """Whether a run here is on Apple's GPU. PyTorch is not asked on other systems."""
    if sys.platform != "darwin" or is_variable_true("ACCELERATE_USE_CPU"):
        return False
    return get_best_device().type == "mps"


def measure_apple_memory() -> tuple[float, float]:
    """GiB that Metal says a process should use at most, and what this process has of it."""
    import torch

    return torch.mps.recommended_max_memory() / GIB, torch.mps.current_allocated_memory() / GIB


def measure_free_gib(device: Any) -> float | None:
    """GiB that this process can still use on a GPU; None for other devices."""
    if device.type == "mps":
        most, used = measure_apple_memory()
        return most - used
    if device.type != "cuda":
        return None
    import torch

    # The driver counts as used what the allocator keeps, though it has room for this process.
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + kept) / GIB


def measure_free_gpu_gib() -> float | None:
    """`measure_free_gib` of this process's GPU; None without a GPU, or when accelerate is told to
    use the CPU. It includes the CUDA context, which asking the driver creates."""
    if is_variable_true("ACCELERATE_USE_CPU"):
        return None
    import torch  # not before it is needed: a dry run answers at once

    device = get_best_device()
    if device.type != "cuda":
        return measure_free_gib(device)
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return measure_free_gib(own) + CONTEXT_GIB


def get_device(model: Any) -> Any:
    """Where a model computes. Models that take turns on a GPU lie in the CPU's memory meanwhile."""
    hook = getattr(model, "_hf_hook", None)
    return getattr(hook, "execution_device", None) or model.device


def free_unused_blocks(device: Any) -> None:
    """Give the blocks that a GPU's allocator keeps back to the driver."""
    import torch

    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def free_unused_host_blocks() -> None:
    """The same of pinned memory, to the system; not by an older PyTorch."""
    import torch

    if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()


def has_gpu() -> bool:
    """Whether PyTorch finds an Nvidia or AMD GPU, or Apple's."""
    return get_best_device().type != "cpu"


def has_fast_search() -> bool:
    """Whether cuDNN finds each convolution's algorithm soon: AMD's MIOpen searches for minutes."""
    import torch

    return not torch.version.hip


WHEELS_COMMAND = (
    "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/"
)
"""What installs another build of PyTorch; the build's name follows."""
CUDA_BUILD = "cu128"
"""PyTorch's build for Nvidia; pytorch.org names those for other drivers."""
ROCM_BUILD = "rocm6.4"
"""The same for AMD."""
HIDING_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables by which a user hides GPUs from programs."""


def explain_unused_gpu() -> str | None:
    """Where a GPU's driver is installed and PyTorch sees no GPU, one line that says why, with the
    remedy. None where it sees one, where there is no driver, and where the environment asks for the
    CPU. PyPI's PyTorch is built for Nvidia on Linux, and for the CPU on Windows."""
    # Nobody wonders about a GPU that was hidden on purpose.
    is_hidden = any(os.environ.get(name) in ("", "-1") for name in HIDING_VARIABLES)
    if has_gpu() or is_hidden or is_variable_true("ACCELERATE_USE_CPU"):
        return None
    import torch

    # With a build for this GPU the driver or the rights are at fault, else the build is.
    not_built = f"PyTorch {torch.__version__} is not built for it"
    if has_nvidia_driver():
        if torch.version.cuda:
            remedy = "install a newer driver, as `nvidia-smi` says"
            return f"PyTorch for CUDA {torch.version.cuda} sees no GPU: {remedy}."
        return f"there is an Nvidia GPU, and {not_built}: {WHEELS_COMMAND}{CUDA_BUILD}"
    if os.path.exists("/dev/kfd") or shutil.which("rocminfo"):
        if torch.version.hip:
            group = "sudo usermod -aG render,video $USER"
            reasons = f"it knows another, or you may not use it ({group}, then log in anew)"
            return f"PyTorch for ROCm sees no GPU: {reasons}."
        return f"there is an AMD GPU, and {not_built}: {WHEELS_COMMAND}{ROCM_BUILD}"
    return None


def has_nvidia_driver() -> bool:
    """Whether `nvidia-smi` lists a GPU. The program alone may be there without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listed = subprocess.check_output([command, "-L"], text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return "GPU " in listed


def has_fast_bf16() -> bool:
    """Whether this CPU computes bf16 at least as fast as fp32, by what oneDNN says."""
    import torch

    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def is_variable_true(variable: str) -> bool:
    """Whether `accelerate launch`, or the user, turned this on in the environment."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def choose_family_precision(facts: FamilyFacts | None) -> str:
    """`choose_half_precision` for this family: "no" where it would be fp16, in which transformers
    overflow."""
    half = choose_half_precision()
    is_transformer = facts is not None and facts.style == "flow"
    return "no" if half == "fp16" and is_transformer else half


def get_precision(config: TrainConfig) -> str:
    """The precision that accelerate uses: that of the flag, or of `accelerate launch` in the
    environment."""
    return config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"


def check_bf16(config: TrainConfig, instead: str = "fp16") -> None:
    """Raises UserError for a run in bf16, by its flags or `accelerate launch`, on a GPU without it.
    `instead` is what the message advises."""
    if get_precision(config) != "bf16" or is_variable_true("ACCELERATE_USE_CPU"):
        return
    import torch  # not before it is needed: a dry run answers at once

    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name()} "
            f"(compute capability {major}.{minor}) has no bf16, which begins at 8.0: "
            f"give --mixed_precision {instead}."
        )
