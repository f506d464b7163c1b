"""Facts of this machine's device: its kind, its free memory, and whether it computes bf16; and of a
launcher's processes. PyTorch is imported only by the functions that need it.

Nvidia's GPUs compute bf16 since Ampere (compute capability 8.0), and CPUs with AVX-512, AMX or
Arm's bf16. On older GPUs PyTorch emulates bf16, and cuDNN has no convolutions in it; on other CPUs
it is many times slower than fp32.
"""

import gc
import os
import shutil
import subprocess
import sys
from contextvars import ContextVar
from typing import Any

from dreambooth_moslora.disk import processes
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.precision import choose_half_precision
from dreambooth_moslora.settings.family_facts import FamilyFacts
from dreambooth_moslora.settings.train_config import TrainConfig

GIB = 2**30
CONTEXT_GIB = 0.5
"""Memory of a process's CUDA context, beside its tensors."""
ENCODER_BYTES_PER_PIXEL = 2600
"""Peak of SDXL's fp32 VAE encoder beside its weights, per pixel of the photo."""
TILES_PX = (512, 256)
"""Sides of the VAE's tiles if a whole image does not fit into memory, largest first."""

OUTPUTS_PER_BLOCK = 32
"""Outputs that the 4-bit kernels for CPUs compute at a time. It divides every width of SDXL."""
RESIDENT_BLOCKS = 2
"""Streamed blocks that lie on the device: the block that computes and the next, being copied."""

assumed_vram_gib: ContextVar[float | None] = ContextVar("assumed_vram_gib", default=None)
"""Memory of a GPU that is elsewhere, for which this context only plans; None for this machine's."""


def get_world_size() -> int:
    """Return how many processes a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def get_local_world_size() -> int:
    """Return how many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_world_size()))


def is_main_process() -> bool:
    """Return whether this is the run's first process, which alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def get_best_device() -> Any:
    """Return the GPU of Nvidia or AMD, else Apple's, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_on_apple() -> bool:
    """Return whether a run would use Apple's GPU, without PyTorch on other systems."""
    if sys.platform != "darwin" or is_variable_true("ACCELERATE_USE_CPU"):
        return False
    if assumed_vram_gib.get():
        return False
    return get_best_device().type == "mps"


def measure_apple_memory() -> tuple[float, float]:
    """Return the GiB that Metal recommends at most for a process, and those that this one uses."""
    import torch

    return torch.mps.recommended_max_memory() / GIB, torch.mps.current_allocated_memory() / GIB


def measure_free_gib(device: Any) -> float | None:
    """Return the GiB that this process can still use on a GPU; None for other devices."""
    if device.type == "mps":
        limit, used = measure_apple_memory()
        return limit - used
    if device.type != "cuda":
        return None
    import torch

    # The driver counts the allocator's unused blocks as used, though this process can use them.
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + unused) / GIB


def measure_free_gpu_gib() -> float | None:
    """Return the free GiB of this process's GPU; None without a GPU, or if accelerate uses the CPU.
    The CUDA context, which this measurement creates, counts as free."""
    # The driver and a desktop use a little of each card.
    vram_gib = assumed_vram_gib.get()
    if vram_gib:
        return 0.98 * vram_gib - 0.35 + CONTEXT_GIB
    if is_variable_true("ACCELERATE_USE_CPU"):
        return None
    import torch

    device = get_best_device()
    if device.type != "cuda":
        return measure_free_gib(device)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return measure_free_gib(device) + CONTEXT_GIB


def get_device(model: Any) -> Any:
    """Return the device on which a model computes. Offloaded models lie in the host's memory until
    it is their turn."""
    hook = getattr(model, "_hf_hook", None)
    return getattr(hook, "execution_device", None) or model.device


def measure_peak_gib(device: Any) -> float | None:
    """Return the peak memory so far, GiB: reserved by PyTorch on a GPU, else of the process.
    Apple's GPUs tell only what is reserved now."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    return processes.measure_peak_memory_gib()


def free_unused_memory(device: Any) -> None:
    """Return a GPU's unused memory to the driver: the blocks of one phase do not fit the next."""
    import torch

    # Tensors in reference cycles are freed first, so that their blocks are unused too.
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def free_unused_host_blocks() -> None:
    """Return unused pinned memory to the system, which older versions of PyTorch cannot do."""
    import torch

    if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()


def has_gpu() -> bool:
    """Return whether PyTorch finds an Nvidia or AMD GPU, or Apple's, or the plan assumes one."""
    return bool(assumed_vram_gib.get()) or get_best_device().type != "cpu"


def has_fast_search() -> bool:
    """Return whether cuDNN's search for convolution algorithms is fast: AMD's MIOpen searches for
    minutes."""
    import torch

    return not torch.version.hip


TORCH_COMMAND = (
    "uv pip install --reinstall-package torch --reinstall-package torchvision "
    "torch torchvision --torch-backend=auto"
)
"""Command that installs PyTorch again, built for this machine's card and driver. It is the same in
bash and PowerShell."""
HIDING_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Environment variables by which a user hides GPUs from programs."""


def explain_unused_gpu() -> str | None:
    """Explain in one line why PyTorch sees no GPU though a driver is installed, and the remedy.
    None if it sees a GPU, if there is no driver, and if the environment asks for the CPU. PyPI's
    PyTorch is built for Nvidia on Linux, and for the CPU on Windows."""
    # A GPU that was hidden on purpose needs no explanation.
    is_hidden = any(os.environ.get(name) in ("", "-1") for name in HIDING_VARIABLES)
    if has_gpu() or is_hidden or is_variable_true("ACCELERATE_USE_CPU"):
        return None
    import torch

    # With a build for this GPU the cause is the driver or the user's rights, else the build.
    not_built = f"PyTorch {torch.__version__} is not built for it: pip install uv, then"
    if has_nvidia_driver():
        if torch.version.cuda:
            return (
                f"PyTorch for CUDA {torch.version.cuda} sees no GPU: "
                "install a newer driver, as `nvidia-smi` says."
            )
        return f"there is an Nvidia GPU, and {not_built} {TORCH_COMMAND}"
    if os.path.exists("/dev/kfd") or shutil.which("rocminfo"):
        if torch.version.hip:
            return (
                "PyTorch for ROCm sees no GPU: it knows another, or you may not use it "
                "(sudo usermod -aG render,video $USER, then log in anew)."
            )
        return f"there is an AMD GPU, and {not_built} {TORCH_COMMAND}"
    return None


def has_nvidia_driver() -> bool:
    """Return whether `nvidia-smi` lists a GPU. It may be installed without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listed = subprocess.check_output([command, "-L"], text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return "GPU " in listed


def has_fast_bf16() -> bool:
    """Return whether this CPU computes bf16 at least as fast as fp32, according to oneDNN."""
    import torch

    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def is_variable_true(variable: str) -> bool:
    """Return whether `accelerate launch`, or the user, set this environment variable to true."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def choose_family_precision(facts: FamilyFacts | None) -> str:
    """Choose the half precision for a family: "no" in place of fp16 for transformers, which
    overflow in it."""
    half = "bf16" if assumed_vram_gib.get() else choose_half_precision()
    is_transformer = facts is not None and facts.style == "flow"
    return "no" if half == "fp16" and is_transformer else half


def get_precision(config: TrainConfig) -> str:
    """Return the precision that accelerate uses, by the flag or by `accelerate launch`."""
    return config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"


def check_bf16(config: TrainConfig, instead: str = "fp16") -> None:
    """Raise UserError for a run in bf16 on a GPU without it, and advise the precision `instead`."""
    if get_precision(config) != "bf16" or is_variable_true("ACCELERATE_USE_CPU"):
        return
    import torch

    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name()} "
            f"(compute capability {major}.{minor}) has no bf16, which begins at 8.0: "
            f"give --mixed_precision {instead}."
        )
