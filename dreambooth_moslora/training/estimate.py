"""What a run will need, before it begins: memory while training, and room on the disk.

Weights and adapters are counted exactly, from the headers of the base's files. Activations are a rule of thumb,
measured once on SDXL's UNet (bf16, one image of 1024 px, CPU: 6.7 GiB, about a third of it with gradient
checkpointing, plus 0.4 GiB that does not depend on the size) and taken as proportional to pixels, batch and bytes.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.base.headers import tensor_shapes
from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.targets import is_target

__all__ = ["BaseSize", "Estimate", "estimate", "size_of_base"]

GIB = 2**30
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "nf4": 0.56, "int8": 1.05}
TRAINING_BYTES = 16
"""fp32 weight, gradient and two moments of Adam, a number; 8-bit Adam needs 10."""
ACTIVATION_GIB, CHECKPOINTED_SHARE, FIXED_GIB = 6.7, 0.33, 0.4
DECODER_BYTES_A_PIXEL = 4300
"""Peak of the fp32 VAE's decoder beside its weights, a pixel of the picture."""
PNG_BYTES_A_PIXEL = 1.6


@dataclass(frozen=True)
class BaseSize:
    """Numbers of parameters, and the sum of (in + out) over the layers that get an adapter, with their count.

    Of a convolution, in is channels times kernel: (out, in, h, w) counts in·h·w + out.
    """

    unet: int = 2_567_463_684
    text_encoders: int = 123_060_480 + 694_659_840
    vae: int = 83_653_863
    adapted_widths: int = 1_451_520
    adapted_layers: int = 560
    is_measured: bool = False


@dataclass(frozen=True)
class Estimate:
    """GiB; `adapter_parameters` is a count."""

    adapter_parameters: int
    encoding_gib: float
    training_gib: float
    sampling_gib: float
    checkpoint_gib: float
    disk_gib: float
    size: BaseSize


def size_of_base(folder: Path | None, target_modules: tuple[str, ...], variant: str | None = None) -> BaseSize:
    """Counted from the diffusers folder of the base; SDXL's own size when there is none to look into.

    Raises UserError for damaged files.
    """
    shapes = {part: tensor_shapes(folder / part, variant) for part in PARTS} if folder is not None else {}
    if not shapes or not all(shapes.values()):
        return BaseSize()
    weights = {name: shape for name, shape in shapes["unet"].items() if name.endswith(".weight")}
    layers = {name.removesuffix(".weight"): shape for name, shape in weights.items()}
    adapted = [shape for path, shape in layers.items() if any(is_target(path, name) for name in target_modules)]
    count = {part: sum(map(math.prod, found.values())) for part, found in shapes.items()}
    texts = count["text_encoder"] + count["text_encoder_2"]
    widths = sum(shape[0] + math.prod(shape[1:]) for shape in adapted)
    return BaseSize(count["unet"], texts, count["vae"], widths, len(adapted), True)


PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")


def estimate(config: TrainConfig, size: BaseSize, total_steps: int, photo_count: int) -> Estimate:
    precision = "fp32" if config.mixed_precision in (None, "no") else config.mixed_precision
    number = BYTES[precision]
    adapter = config.rank * size.adapted_widths
    adapter += size.adapted_layers * config.rank**2 if config.mixer != "none" else 0
    kept = BYTES[config.base_quantization] if config.base_quantization != "none" else number
    unet, texts, vae = size.unet * kept / GIB, size.text_encoders * number / GIB, size.vae * 4 / GIB
    optimized = adapter * (10 if config.use_8bit_adam else TRAINING_BYTES) / GIB
    weights = unet + optimized + (texts if config.train_text_encoder else 0)
    decoder = vae + config.resolution**2 * DECODER_BYTES_A_PIXEL / GIB
    checkpoint = adapter * 12 / GIB
    return Estimate(
        adapter_parameters=adapter,
        encoding_gib=unet + texts + decoder,
        training_gib=weights + activations_gib(config, size, number),
        sampling_gib=weights + decoder + FIXED_GIB,
        checkpoint_gib=checkpoint,
        disk_gib=disk_gib(config, adapter, checkpoint, total_steps),
        size=size,
    )


def activations_gib(config: TrainConfig, size: BaseSize, number: float) -> float:
    """Of one forward and backward pass; a UNet narrower than SDXL's needs less, about as its width."""
    images = config.train_batch_size * (2 if config.with_prior_preservation else 1)
    width = math.sqrt(size.unet / BaseSize().unet)
    share = CHECKPOINTED_SHARE if config.gradient_checkpointing else 1.0
    pixels = (config.resolution / 1024) ** 2
    return FIXED_GIB * width + ACTIVATION_GIB * width * pixels * images * number / 2 * share


def disk_gib(config: TrainConfig, adapter: int, checkpoint_gib: float, total_steps: int) -> float:
    checkpoints = math.ceil(total_steps / config.checkpointing_steps)
    checkpoints = min(checkpoints, config.checkpoints_total_limit or checkpoints)
    samples = config.num_validation_images * (2 + total_steps // (config.validation_steps or max(1, total_steps)))
    made = config.with_prior_preservation and config.prior == "class_images" and not config.class_data_dir
    pictures = samples + (config.num_class_images if made else 0)
    return checkpoints * checkpoint_gib + (adapter * 8 + pictures * config.resolution**2 * PNG_BYTES_A_PIXEL) / GIB
