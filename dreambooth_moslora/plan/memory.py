"""Estimate the GPU's memory in each phase of a run, and the disk space.

Weights and adapters are counted exactly, from the headers of the base's files. The memory of a step
was counted on SDXL's UNet operation by operation (`benchmarks.gpu_memory`: bf16, images of 1024
px), and on a model of each flow family (`benchmarks.family_memory`); it is scaled by pixels or
tokens, images and bytes.

Each setting that saves memory is counted in one function:

    base_quantization                                  `estimate_denoiser_gib`
    stream_blocks                                      `estimate_host_gib`
    gradient_checkpointing, recompute_feed_forward     `estimate_step_gib`
"""

import math
from dataclasses import dataclass, replace

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.devices import get_precision
from dreambooth_moslora.plan.base_size import BaseSize
from dreambooth_moslora.settings import family_facts, optimizers, train_config

# Bytes of a parameter or an activation, by precision.
PRECISION_BYTES = {"no": 4.0, "fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
QUANTIZED_BYTES = {"nf4": 0.516, "int8": 1.016}
"""Bytes of a quantised parameter, with its share of the scales. Those outside the blocks keep their
precision."""
STREAMED_BYTES = {"nf4": 0.5, "int8": 1.0}
"""The same without the scales, which stay on the device."""
FLOP_PER_COPIED_BYTE = 100e12 / 25e9
"""What a GPU computes while the host sends it a byte, by published figures, not measured: three
fifths of the 165 TFLOPS of an RTX 4090, over PCIe 4 with 16 lanes. Slower cards compute less."""
UNET_TOKENS = 1200
"""Tokens of an image of 1024 px for which each of the UNet's weights is used on average: SDXL's
pass takes 6 TFLOP."""
AVERAGE_BYTES = 4
"""Further bytes per parameter of a checkpoint with an average."""
GRADIENT_BYTES = 4
"""Of those of the optimizer, what no checkpoint holds."""
STEP_GIB = 5.24
STEP_GIB_PER_RANK = 0.00102
"""GiB of a step's image of 1024 px without recomputation, and in addition for each rank."""
ATTENTION_SCORES_GIB = (12.2, 1.75)
"""What Apple's attention adds, which keeps all scores for the backward pass (pytorch #179294):
without and with recomputation, counted with attention in single operations."""
FEED_FORWARD_GIB = 2.15
"""GiB of them that recomputing the feed-forward blocks saves."""
STEP_TEXT_GIB = 0.025
"""The same of its text, which does not grow with the image."""
TRAINED_TEXT_GIB = 0.125
"""GiB of a prompt's pass through SDXL's text encoders where they are trained;
counted like a step."""
RECOMPUTED_TEXT_RATIO = 0.1
"""What is left of them with recomputation, as of SDXL's UNet."""
PEFT_STEP_RATIO = 1.4
PEFT_RECOMPUTED_RATIO = 1.1
"""Factors where PEFT's own layers compute the adapter: DoRA, or dropout."""
TEXT_ENCODING_GIB = 0.1
"""Peak of encoding one prompt, beside the encoders."""
RESIDENT_TEXT_ENCODER_RATIO = 0.3
"""Of the text encoders' weights, what is on a device that streams their blocks: of Gemma 2. Of
small ones it is more, which is little."""
SAMPLING_GIB = 0.31
"""GiB of the UNet's pass with and without a prompt, for an image of 1024 px in half precision."""
PNG_BYTES_PER_PIXEL = 1.6
"""Size of a run's images on disk."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimates in GiB, and the count `adapter_parameters`."""

    adapter_parameters: int
    encoding_gib: float
    training_gib: float
    sampling_gib: float
    checkpoint_gib: float
    disk_gib: float
    size: BaseSize

    @property
    def peak_gib(self) -> float:
        return max(self.encoding_gib, self.training_gib, self.sampling_gib)


def estimate_memory(
    config: train_config.TrainConfig, size: BaseSize, total_steps: int
) -> MemoryEstimate:
    """Return the device memory of each phase, and the disk space, GiB."""
    # The frozen weights of each part, and of the denoiser's those that the host keeps.
    unet = estimate_denoiser_gib(config, size)
    texts = size.text_encoders * PRECISION_BYTES[get_precision(config)] / devices.GIB
    vae = size.vae * get_vae_number_bytes(config, size) / devices.GIB

    # The adapter with its gradients and the optimizer's states.
    kind = optimizers.get_optimizer_kind(config)
    is_8_bit = config.use_8bit_adam and kind.in_8_bit
    bytes_each = optimizers.BYTES_IN_8_BIT if is_8_bit else kind.bytes_each
    adapter = count_adapter_parameters(config, size)
    optimized = adapter * bytes_each / devices.GIB
    weights = unet - estimate_host_gib(config, size) + optimized
    if config.train_text_encoder:
        weights += texts

    # Before the first step, photos and texts are encoded.
    preparing = estimate_preparing_gib(config, size=size, unet=unet, texts=texts, vae=vae)

    # A step, on top of the weights. Without a cache it encodes its photos too.
    step = estimate_step_gib(config, size, adapter) + estimate_text_training_gib(config, size)
    if config.caching == "off":
        step += vae

    # A sample between two steps: the UNet and the decoder work one after the other.
    decoder = estimate_tile_gib(config, size, size.family.decoder_bytes_per_pixel)
    denoising = estimate_sampling_gib(config, size)
    sampling = vae + max(decoder, denoising)
    if not (config.sample_count or config.is_scored):
        sampling = 0

    # A checkpoint has the states, and no gradients.
    in_checkpoint = bytes_each - GRADIENT_BYTES + AVERAGE_BYTES * kind.averages
    checkpoint = adapter * in_checkpoint / devices.GIB
    return MemoryEstimate(
        adapter_parameters=adapter,
        encoding_gib=devices.CONTEXT_GIB + preparing,
        training_gib=devices.CONTEXT_GIB + weights + step,
        sampling_gib=devices.CONTEXT_GIB + weights + sampling,
        checkpoint_gib=checkpoint,
        disk_gib=estimate_disk_gib(config, adapter, checkpoint, total_steps),
        size=size,
    )


def estimate_denoiser_gib(config: train_config.TrainConfig, size: BaseSize) -> float:
    """Return the size of the denoiser's frozen weights, on the device and on the host, GiB."""
    number = PRECISION_BYTES[get_precision(config)]
    in_blocks = size.projections * QUANTIZED_BYTES.get(config.base_quantization, number)
    return ((size.unet - size.projections) * number + in_blocks) / devices.GIB


def estimate_host_gib(config: train_config.TrainConfig, size: BaseSize) -> float:
    """Return by how much the device holds less than those during a step, GiB."""
    if not config.stream_blocks:
        return 0.0
    return estimate_streamed_away_gib(config, size, config.streamed_share)


def estimate_streamed_away_gib(
    config: train_config.TrainConfig, size: BaseSize, share: float = 1.0
) -> float:
    """Return the size of the weights that leave the device when this share of the blocks is
    streamed, less the buffers that take their place, GiB."""
    buffers = estimate_streamed_gib(config, size, devices.RESIDENT_BLOCKS)
    return share * estimate_streamed_gib(config, size) - buffers


def estimate_streamed_gib(
    config: train_config.TrainConfig, size: BaseSize, blocks: int | None = None
) -> float:
    """Return the size of the weights of so many streamed `blocks`, or of all, GiB."""
    number = STREAMED_BYTES.get(config.base_quantization, PRECISION_BYTES[get_precision(config)])
    count = size.streamed if blocks is None else blocks * size.largest_block
    return min(count, size.streamed) * number / devices.GIB


def is_streaming_hidden(config: train_config.TrainConfig, size: BaseSize) -> bool:
    """Return whether the streamed blocks are copied in less time than a forward pass computes. A
    backward pass copies as much and computes twice as long.

    A pass takes 2·n·t FLOP for n weights and t tokens, and copies share·bytes·n.
    """
    if not config.stream_blocks:
        return True
    number = STREAMED_BYTES.get(config.base_quantization, PRECISION_BYTES[get_precision(config)])
    memory = size.family.memory
    tokens = UNET_TOKENS * (config.resolution / 1024) ** 2
    if memory:
        tokens = config.resolution**2 / family_facts.PX_PER_TOKEN + memory.text_tokens
    copied_bytes = config.streamed_share * number
    return copied_bytes * FLOP_PER_COPIED_BYTE <= 2 * tokens * config.images_per_pass


def get_vae_number_bytes(config: train_config.TrainConfig, size: BaseSize) -> float:
    """Return the bytes of a number in the VAE: that of a UNet works in fp32."""
    return PRECISION_BYTES[get_precision(config)] if size.family.style == "flow" else 4.0


def estimate_tile_gib(
    config: train_config.TrainConfig, size: BaseSize, bytes_per_pixel: int
) -> float:
    """Return the VAE's memory beside its weights for its smallest tiles, GiB, as where memory is
    short. `bytes_per_pixel` are for fp32."""
    side = min(config.resolution, size.family.tile_px)
    return side**2 * bytes_per_pixel * get_vae_number_bytes(config, size) / 4 / devices.GIB


def estimate_preparing_gib(
    config: train_config.TrainConfig, size: BaseSize, unet: float, texts: float, vae: float
) -> float:
    """Return the peak before the first step, GiB: photos are encoded, then texts.

    config: of the run
    size: of its base
    unet, texts, vae: weights of the denoiser, the text encoders and the autoencoder, GiB
    """
    encoder = vae + estimate_tile_gib(config, size, devices.ENCODER_BYTES_PER_PIXEL)

    # Class images are drawn first: one at a time if need be, and where the base does not fit, its
    # blocks are streamed.
    class_images = 0.0
    if config.uses_class_images:
        decoder = estimate_tile_gib(config, size, size.family.decoder_bytes_per_pixel)
        weights = (
            unet
            - estimate_streamed_away_gib(config, size)
            + RESIDENT_TEXT_ENCODER_RATIO * texts
            + vae
        )
        class_images = weights + max(decoder, estimate_sampling_gib(config, size))

    # A flow's denoiser is loaded later, and its text encoders encode on the CPU if they do not fit.
    if size.family.style == "flow" and not config.train_text_encoder:
        return max(class_images, encoder)
    return max(class_images, encoder, texts + TEXT_ENCODING_GIB)


def count_adapter_parameters(config: train_config.TrainConfig, size: BaseSize) -> int:
    """Count the parameters of A, B and the mixers. Patterns count only where the layers' paths are
    known."""
    layers = [
        (train_config.get_rank_and_alpha(config, "unet", path)[0], width)
        for path, width in size.widths
    ]

    # Of layers that are only counted, each has the mean width.
    if not layers:
        mean_width = size.adapted_widths / max(1, size.adapted_layers)
        layers = [(config.rank, mean_width)] * size.adapted_layers
    if config.train_text_encoder:
        mean_width = size.text_widths / max(1, size.text_layers)
        layers += [(config.rank, mean_width)] * size.text_layers
    return round(
        sum(train_config.count_layer_parameters(config, rank, width) for rank, width in layers)
    )


def estimate_sampling_gib(config: train_config.TrainConfig, size: BaseSize) -> float:
    """Return the memory of a denoising step of one image, GiB. A transformer's largest block
    decides it."""
    memory = size.family.memory
    if memory is None:
        return SAMPLING_GIB * compute_cost_ratio(config, size)

    # Of the model that the family was counted on
    models = size.family.models
    counted = min(models, key=lambda model: abs(model.parameters - memory.parameters))
    width = math.sqrt(size.largest_block / counted.largest_block)
    return (
        memory.sampling_gib
        * compute_token_ratio(config, memory)
        * width
        * PRECISION_BYTES[get_precision(config)]
        / 2
    )


def compute_cost_ratio(config: train_config.TrainConfig, size: BaseSize) -> float:
    """Return the cost relative to an image of 1024 px in half precision of SDXL, or of the model on
    which the family was counted.

    A narrower model needs less, about in proportion to its width. A transformer's cost grows with
    all tokens, also those of the text.
    """
    memory = size.family.memory
    if memory:
        width = math.sqrt(size.unet / memory.parameters)
        return (
            compute_token_ratio(config, memory) * width * PRECISION_BYTES[get_precision(config)] / 2
        )
    width = math.sqrt(size.unet / BaseSize.unet)
    return (config.resolution / 1024) ** 2 * width * PRECISION_BYTES[get_precision(config)] / 2


def compute_token_ratio(
    config: train_config.TrainConfig, memory: family_facts.ActivationMemory
) -> float:
    """Return the number of tokens of an image and its text, relative to those of 1024 px."""
    image_tokens = config.resolution**2 / family_facts.PX_PER_TOKEN
    full_size_tokens = 1024**2 / family_facts.PX_PER_TOKEN
    return (image_tokens + memory.text_tokens) / (full_size_tokens + memory.text_tokens)


def estimate_step_gib(config: train_config.TrainConfig, size: BaseSize, adapter: int) -> float:
    """Return the memory of a forward and backward pass, without weights and gradients, GiB."""
    images = config.images_per_pass
    uses_peft = config.use_dora or config.lora_dropout > 0
    scale = compute_cost_ratio(config, size) * images
    memory = size.family.memory
    attention_gib = ATTENTION_SCORES_GIB if devices.is_on_apple() and not memory else (0.0, 0.0)

    # Whole blocks are recomputed: little more than their inputs is kept.
    if config.gradient_checkpointing:
        recomputed = (memory or size.family).recomputed_gib + attention_gib[1]
        return recomputed * scale * (PEFT_RECOMPUTED_RATIO if uses_peft else 1)

    # A transformer was counted as a whole.
    if memory:
        return memory.full_gib * scale * (PEFT_STEP_RATIO if uses_peft else 1)

    # The UNet's grows with the rank, of which patterns change the average.
    plain = count_adapter_parameters(replace(config, rank_pattern=()), size)
    rank = adapter * config.rank / max(1, plain)
    image = STEP_GIB + STEP_GIB_PER_RANK * rank * size.adapted_layers / 560
    image *= PEFT_STEP_RATIO if uses_peft else 1
    image += attention_gib[0] - (FEED_FORWARD_GIB if config.recompute_feed_forward else 0)
    text = STEP_TEXT_GIB * images * math.sqrt(size.unet / BaseSize.unet)
    casts = adapter * 2 / devices.GIB
    return image * scale + text + casts


def estimate_text_training_gib(config: train_config.TrainConfig, size: BaseSize) -> float:
    """Return the memory of a step's prompts in trained text encoders for the backward pass, GiB."""
    if not config.train_text_encoder:
        return 0.0
    prompts = config.images_per_pass * size.text_widths / BaseSize.text_widths
    activations = TRAINED_TEXT_GIB * prompts * PRECISION_BYTES[get_precision(config)] / 2
    return activations * (RECOMPUTED_TEXT_RATIO if config.gradient_checkpointing else 1)


def estimate_disk_gib(
    config: train_config.TrainConfig, adapter: int, checkpoint_gib: float, total_steps: int
) -> float:
    """Return the disk space of a run, GiB.

    config: of the run
    adapter: its parameters, a count
    checkpoint_gib: of one checkpoint
    total_steps: optimizer steps
    """
    # Checkpoints, with one at the end if its step is no multiple.
    checkpoints, last_steps = divmod(total_steps, config.checkpointing_steps)
    checkpoints = min(checkpoints, config.checkpoints_total_limit or checkpoints) + (last_steps > 0)

    # Pictures: samples, and the class images that have no folder of the user's.
    subjects = config.each_subject
    times = 2 + total_steps // (config.validation_steps or max(1, total_steps))
    samples = len(subjects) * config.sample_count * times
    classes = {
        subject.class_prompt
        for subject in subjects
        if subject.uses_class_images and not subject.class_data_dir
    }
    pixels = (samples + len(classes) * config.num_class_images) * config.resolution**2

    # Published files, that of the best step beside the last.
    published = 2 if config.evaluate_steps else 1
    files = (published * adapter * 8 + pixels * PNG_BYTES_PER_PIXEL) / devices.GIB
    return checkpoints * checkpoint_gib + files
