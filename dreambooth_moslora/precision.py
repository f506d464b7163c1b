"""Half precision of the current GPU."""

MIN_BF16_CAPABILITY = 8
"""Nvidia's first compute capability with bf16 convolutions and matrix products."""
FP16_OVERFLOW_ADVICE = "--mixed_precision bf16, or no on Nvidia GPUs before Ampere"
"""Flags that help where fp16 overflows."""
AMD_BF16_ARCHITECTURES = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""AMD's architectures with matrix units for bf16: CDNA, and RDNA from the third on."""


def choose_half_precision() -> str:
    """Return bf16 if the current GPU computes in it, else fp16. There must be a GPU."""
    import torch  # slow to import, and a dry run does not need it

    if torch.backends.mps.is_available():  # Apple's GPUs have bf16 since macOS 14
        return "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "fp16"
    if torch.version.hip:  # AMD's compute capability is the architecture's number
        has_bf16 = torch.cuda.get_device_properties().gcnArchName.startswith(AMD_BF16_ARCHITECTURES)
    else:
        has_bf16 = torch.cuda.get_device_capability()[0] >= MIN_BF16_CAPABILITY
    return "bf16" if has_bf16 else "fp16"
