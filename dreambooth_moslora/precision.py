"""Which half precision a GPU computes in."""

MIN_BF16_CAPABILITY = (
    8  # The first compute capability of Nvidia's with bf16 convolutions and matrix products.
)
FP16_OVERFLOW_ADVICE = "--mixed_precision bf16, or no on Nvidia GPUs before Ampere"
"""What helps where fp16 overflows."""
AMD_BF16_ARCHITECTURES = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""The architectures of AMD's with matrix units for bf16: CDNA, and RDNA from the third on."""


def choose_half_precision() -> str:
    """bf16 where the current GPU has it, else fp16. There must be a GPU; Apple's have bf16 since
    macOS 14."""
    import torch  # not before it is needed: a dry run answers at once

    if torch.backends.mps.is_available():
        return "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "fp16"
    if torch.version.hip:  # its compute capability is the architecture's number
        has_bf16 = torch.cuda.get_device_properties().gcnArchName.startswith(AMD_BF16_ARCHITECTURES)
    else:
        has_bf16 = torch.cuda.get_device_capability()[0] >= MIN_BF16_CAPABILITY
    return "bf16" if has_bf16 else "fp16"
