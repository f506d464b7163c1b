"""Memory and speed of a run before it begins, and what is chosen by them, the same in all its
processes.

Weights and adapters are counted exactly, from the headers of the base's files. The memory of a step
was counted on SDXL's UNet operation by operation (`benchmarks.gpu_memory`: bf16, images of 1024
px), and on a model of each flow family (`benchmarks.family_memory`); it is scaled by pixels or
tokens, images and bytes.

Speed on a GPU, which changes only rounding. On a CPU all are off; `--compile on` turns on the
first.

blocks compiled    `torch.compile` of the UNet's transformer blocks, each kind once (`--compile`)
cuDNN's search     tries algorithms at each convolution's first call; sizes must be fixed; not on
                   AMD's but gfx9

`--memory`: one word for precision, recomputation, caching and quantisation, one of the plans in
`settings.table.PLANS`. It only adds to the given flags; on a GPU it also chooses half precision,
unless a precision was given. `auto` is the first plan that is possible and fits the GPU's free
memory; full without a GPU. On Apple's, whose attention keeps all scores, it is always one that
recomputes.

Gradients of these differ at most by rounding, and so do those of one large pass and of several
small ones (`--images_at_once`). A plan fits if its smallest pass does: photos and their prior one
after the other keep half the activations, and recompute nothing. Of the plan, the largest pass that
fits is taken.

Processes with different settings would train different adapters, or wait for each other for ever.
So they agree on the flags and files, then on what is chosen by the GPU with the least free memory.
One process asks nobody, and then nothing here loads torch.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeVar

import psutil

from dreambooth_moslora.base import machine
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.machine import process_count
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import families, optimizer_kinds, rows, rules, table

# Bytes of a parameter or an activation, by precision.
BYTES = {"no": 4.0, "fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
QUANTIZED_BYTES = {"nf4": 0.516, "int8": 1.001}
"""Bytes of a quantised parameter, with its share of the scales. Those outside the blocks keep their
precision."""
AVERAGE_BYTES = 4  # Further bytes per parameter of a checkpoint with an average.
GRADIENT_BYTES = 4  # Of those of the optimizer, what no checkpoint holds.
CONTEXT_GIB = 0.5  # Memory of the CUDA context of a process, beside its tensors.
STEP_GIB = 5.24
STEP_GIB_A_RANK = 0.00102
RECOMPUTED_GIB = 0.51
"""GiB of a step's image of 1024 px: without recomputation, in addition for each rank, and with
recomputation."""
SCORES_GIB = (12.2, 1.75)
"""What Apple's attention adds, which keeps all scores for the backward pass (pytorch #179294):
without and with recomputation, counted with attention in single operations."""
FEED_FORWARD_GIB = 2.15  # GiB of them that recomputing the feed-forward blocks saves.
TEXT_GIB = 0.025  # The same of its text, which does not grow with the image.
TRAINED_TEXT_GIB = 0.125
"""GiB of a prompt's pass through SDXL's text encoders where they, or new tokens, are trained;
counted like a step."""
TOKENS = 77  # Of a prompt in a CLIP text encoder.
PEFT_STEP = 1.4
PEFT_RECOMPUTED = 1.1
"""Factors where PEFT's own layers compute the adapter: a base in 8 bit, DoRA, or dropout."""
TEXTS_GIB = 0.1  # Peak of encoding one prompt, beside the encoders.
# GiB of the UNet's pass without gradients, for an image of 1024 px in half precision.
DRAWING_GIB = 0.15
PNG_BYTES_A_PIXEL = 1.6  # Of a picture of a run on the disk.
# Runs that need less fit every GPU: then neither the driver is asked nor PyTorch loaded.
SMALL_GIB = 2.0
# The model that the constants above were counted on.
SDXL = families.facts_of("StableDiffusionXLPipeline")
STOCK = SDXL.models[0]
STOCK_SDXL = STOCK.hub_id
BLOCKS = re.compile(r"(\w*transformer_blocks|layers|\w*refiner)\.\d+\.")
UNET_BLOCKS = re.compile(r".*transformer_blocks\.\d+\.")
"""Paths of a denoiser's repeated blocks, whose linear layers are quantised."""
WORTH_IMAGES = 1000
"""Forward and backward passes of an image of 1024 px from which compilation pays. Not measured
here: others report about a minute to compile the blocks, and a tenth of a second saved per image.
"""
OF_A_LOADED_BASE = ("recompute_ff", "recompute", "nf4", "nf4_stream")
"""The plans that a run can change to before its first update, from the fastest to the leanest."""
# Usable fraction of the free memory: libraries' workspaces and fragmentation take the rest.
USABLE = 0.9
# Of the host's memory, for streamed blocks: as much as Windows lets a driver pin.
HOST_SHARE = 0.5
Result = TypeVar("Result")


@dataclass(frozen=True)
class BaseSize:
    """Counts of a base's parameters. `adapted_widths` sums (in + out) over the `adapted_layers`
    that get an adapter. `projections` counts the UNet's parameters that quantisation replaces,
    `text_projections` those of cross-attention's to_k and to_v, which have `text_outputs` outputs
    together, `streamed` those that `--stream_blocks` keeps on the host, and `largest_block` those
    of one block. For a convolution (out, in, h, w), in is in·h·w."""

    unet: int = STOCK.parameters
    projections: int = STOCK.in_blocks
    streamed: int = STOCK.in_blocks
    largest_block: int = STOCK.largest_block
    text_projections: int = 340_787_200
    text_outputs: int = 166_400
    text_encoders: int = STOCK.encoders
    vae: int = STOCK.vae
    adapted_widths: int = STOCK.adapted_widths
    adapted_layers: int = STOCK.adapted_layers
    is_measured: bool = False
    widths: tuple[tuple[str, int], ...] = ()
    """Path and in + out of each layer that gets an adapter, where known."""
    family: families.Facts = SDXL
    hub_id: str = ""  # Of the known model, where its files are not here.
    # Whether the base is another model than that one, whose size is not known.
    is_assumed: bool = False
    text_layers: int = sum(count for count, _ in families.CLIP_LAYERS.values())
    text_widths: int = sum(width for _, width in families.CLIP_LAYERS.values())
    """The same of the text encoders' layers that get an adapter if those are trained."""


@dataclass(frozen=True)
class Estimate:
    """All in GiB, but `adapter_parameters`, which is a count."""

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


def size_of_base(base: Base, target_modules: tuple[str, ...]) -> BaseSize:
    """The size of a base with the adapter on these layers, counted in its folder where that is
    whole. Else it is assumed, with the adapter on the family's usual layers, by the model that is
    known by its id, or that a single file is nearest to; of another base by the largest model of
    its family, or by SDXL where the family is not known either. Raises UserError for damaged files.
    """
    if base.shapes and all(base.shapes.values()):
        return size_of_shapes(base.facts, base.shapes, target_modules)

    # Which model it is, or is nearest to.
    facts, model = base.known or (base.facts, None)
    if base.file:
        count = sum(map(math.prod, base.tensors.values()))
        nearest = min(facts.models, key=lambda model: abs(model.parameters - count))
        model = None if facts == SDXL else nearest
    if facts in (None, SDXL):
        return BaseSize(hub_id=model.hub_id if model else "", is_assumed=facts is None)
    is_assumed = model is None
    model = model or max(facts.models, key=lambda one: one.parameters)

    # Its counts. Cross-attention's are known of SDXL alone, without the files.
    clip = [families.CLIP_LAYERS[name] for name in facts.adapted_encoders]
    return BaseSize(
        unet=model.parameters,
        projections=model.in_blocks,
        streamed=model.streamed or model.in_blocks,
        largest_block=model.largest_block,
        text_projections=0,
        text_outputs=0,
        text_encoders=model.encoders,
        vae=model.vae,
        adapted_widths=model.adapted_widths,
        adapted_layers=model.adapted_layers,
        family=facts,
        hub_id=model.hub_id,
        is_assumed=is_assumed,
        text_layers=sum(count for count, _ in clip),
        text_widths=sum(width for _, width in clip),
    )


def size_of_shapes(
    facts: families.Facts,
    shapes: Mapping[str, dict[str, list[int]]],
    target_modules: tuple[str, ...],
) -> BaseSize:
    """The same by the shapes of each part's weights; a part may be missing."""
    count = {part: sum(map(math.prod, found.values())) for part, found in shapes.items()}
    texts = sum(number for part, number in count.items() if part.startswith("text_encoder"))

    # The denoiser's layers, and those that get an adapter.
    layers = {}
    for name, shape in shapes[facts.denoiser].items():
        if name.endswith(".weight") and len(shape) > 1:
            layers[name.removesuffix(".weight")] = shape
    widths = tuple(
        (path, shape[0] + math.prod(shape[1:]))
        for path, shape in layers.items()
        if rows.is_adapted(path, target_modules)
    )

    # Those of each block that quantisation replaces, as `base.load` chooses them.
    pattern = BLOCKS if facts.style == "flow" else UNET_BLOCKS
    blocks: Counter[str] = Counter()
    for path, shape in layers.items():
        block = pattern.match(path)
        if block and len(shape) == 2 and shape[0] % 32 == 0:
            blocks[block[0]] += math.prod(shape)

    # Of these, the blocks that `base.streaming` streams.
    streamed = [number for block, number in blocks.items() if "refiner" not in block]

    # Those that `--cache_cross_attention` keeps off the GPU.
    of_text = [shape for path, shape in layers.items() if rows.is_text_projection(path)]

    # The layers of the text encoders that `--train_text_encoder` adapts.
    clip_widths = []
    for part in facts.adapted_encoders:
        for name, shape in shapes.get(part, {}).items():
            if rows.is_adapted(name.removesuffix(".weight"), rows.TEXT_PROJECTIONS):
                clip_widths.append(sum(shape))

    return BaseSize(
        unet=count[facts.denoiser],
        projections=sum(blocks.values()),
        streamed=sum(streamed),
        largest_block=max(streamed, default=0),
        text_projections=sum(map(math.prod, of_text)),
        text_outputs=sum(shape[0] for shape in of_text),
        text_encoders=texts,
        vae=count.get("vae", 0),
        adapted_widths=sum(width for _, width in widths),
        adapted_layers=len(widths),
        is_measured=True,
        widths=widths,
        family=facts,
        text_layers=len(clip_widths),
        text_widths=sum(clip_widths),
    )


def estimate(config: table.TrainConfig, size: BaseSize, total_steps: int) -> Estimate:
    """The device memory of each phase, and the disk space, GiB."""
    number = BYTES[precision_of(config)]
    kind = optimizer_kinds.optimizer_of(config)
    adapter = adapter_parameters(config, size)

    # The frozen weights of each part.
    quantized = QUANTIZED_BYTES.get(config.base_quantization, number)
    unet = ((size.unet - size.projections) * number + size.projections * quantized) / machine.GIB
    texts = size.text_encoders * number / machine.GIB
    vae = size.vae * 4 / machine.GIB

    # The adapter with its gradients and the optimizer's states, and what the host holds.
    is_8_bit = config.use_8bit_adam and kind.in_8_bit
    bytes_each = optimizer_kinds.BYTES_IN_8_BIT if is_8_bit else kind.bytes_each
    optimized = adapter * bytes_each / machine.GIB
    on_host = size.text_projections * number / machine.GIB if config.cache_cross_attention else 0.0
    if config.stream_blocks:
        on_host += streamed_gib(config, size) - streamed_gib(config, size, machine.PLACES)
    weights = unet - on_host + optimized + (texts if config.keeps_text_encoders else 0)

    # Before the first step, photos and texts are encoded.
    preparing = preparing_gib(config, size=size, unet=unet, texts=texts, vae=vae)

    # A step, on top of the weights. Without a cache it encodes its photos too.
    step = step_gib(config, size, adapter) + trained_texts_gib(config, size)
    if config.caching == "off":
        step += vae

    # A sample between two steps: the UNet and the decoder work one after the other.
    tile = machine.TILES_PX[0] if size.family.style == "flow" else machine.TILES_PX[-1]
    decoder = min(config.resolution, tile) ** 2 * machine.DECODER_BYTES_A_PIXEL / machine.GIB
    denoising = drawing_gib(config, size, images=2)
    drawing = vae + max(decoder, denoising) + products_gib(config, size, images=2)
    if not (config.sample_count or config.is_scored):
        drawing = 0

    # A checkpoint has the states, and no gradients.
    in_checkpoint = bytes_each - GRADIENT_BYTES + AVERAGE_BYTES * kind.averages
    checkpoint = adapter * in_checkpoint / machine.GIB
    return Estimate(
        adapter_parameters=adapter,
        encoding_gib=CONTEXT_GIB + preparing,
        training_gib=CONTEXT_GIB + weights + step,
        sampling_gib=CONTEXT_GIB + weights + drawing,
        checkpoint_gib=checkpoint,
        disk_gib=disk_gib(config, adapter, checkpoint, total_steps),
        size=size,
    )


def streamed_gib(config: table.TrainConfig, size: BaseSize, blocks: int | None = None) -> float:
    """The weights of so many blocks that are streamed, or of all. Scales of weights in 4 bit stay
    on the device."""
    number = 0.5 if config.base_quantization == "nf4" else BYTES[precision_of(config)]
    count = size.streamed if blocks is None else blocks * size.largest_block
    return min(count, size.streamed) * number / machine.GIB


def preparing_gib(
    config: table.TrainConfig, size: BaseSize, unet: float, texts: float, vae: float
) -> float:
    """The most before the first step: photos are encoded, then texts. GiB.

    config: of the run
    size: of its base
    unet, texts, vae: weights of the denoiser, the text encoders and the autoencoder, GiB
    """
    is_flow = size.family.style == "flow"
    side = config.resolution if is_flow else min(config.resolution, machine.TILES_PX[-1])
    encoder = side**2 * machine.ENCODER_BYTES_A_PIXEL / machine.GIB

    # Class images are drawn first, by the whole pipeline.
    if config.draws_class_images:
        drawing = drawing_gib(config, size, images=2 * config.sample_batch_size)
        return unet + texts + vae + max(encoder, drawing)

    # A flow's denoiser is loaded later, and its text encoders encode on the CPU if they do not fit.
    if is_flow and not config.keeps_text_encoders:
        return vae + encoder

    # int8 quantises on the GPU, so that the denoiser is there.
    denoiser = unet if config.base_quantization == "int8" else 0.0
    return max(vae + encoder, texts + TEXTS_GIB) + denoiser


def adapter_parameters(config: table.TrainConfig, size: BaseSize) -> int:
    """Of A, B and the mixers. Patterns count only where the layers' paths are known."""
    layers = [(table.rank_and_alpha(config, "unet", path)[0], width) for path, width in size.widths]

    # Of layers that are only counted, each has the mean width.
    if not layers:
        mean_width = size.adapted_widths / max(1, size.adapted_layers)
        layers = [(config.rank, mean_width)] * size.adapted_layers
    if config.train_text_encoder:
        mean_width = size.text_widths / max(1, size.text_layers)
        layers += [(config.rank, mean_width)] * size.text_layers
    return round(sum(table.layer_parameters(config, rank, width) for rank, width in layers))


def precision_of(config: table.TrainConfig) -> str:
    """The precision that accelerate uses: that of the flag, or of `accelerate launch` in the
    environment."""
    return config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"


def products_gib(config: table.TrainConfig, size: BaseSize, images: int) -> float:
    """The products of cross-attention's to_k and to_v with the images' text, while the host holds
    these weights."""
    products = images * TOKENS * size.text_outputs if config.cache_cross_attention else 0
    return products * BYTES[precision_of(config)] / machine.GIB


def drawing_gib(config: table.TrainConfig, size: BaseSize, images: int) -> float:
    """Memory of the UNet for images denoised together. A picture counts as two images, with and
    without its prompt."""
    memory = size.family.memory
    return (memory.drawing_gib if memory else DRAWING_GIB) * images * scale_of(config, size)


def scale_of(config: table.TrainConfig, size: BaseSize) -> float:
    """Cost relative to an image of 1024 px in half precision of SDXL, or of the model that the
    family was counted on; a narrower model needs less, about as its width. A transformer's grows
    with all tokens, those of the text too."""
    memory = size.family.memory
    if memory:
        tokens = (config.resolution / 16) ** 2 + memory.text_tokens
        width = math.sqrt(size.unet / memory.parameters)
        return tokens / (4096 + memory.text_tokens) * width * BYTES[precision_of(config)] / 2
    width = math.sqrt(size.unet / BaseSize().unet)
    return (config.resolution / 1024) ** 2 * width * BYTES[precision_of(config)] / 2


def step_gib(config: table.TrainConfig, size: BaseSize, adapter: int) -> float:
    """Memory of one forward and backward pass, without weights and gradients."""
    images = config.images_a_pass
    is_pefts = config.base_quantization == "int8" or config.use_dora or config.lora_dropout > 0
    scale = scale_of(config, size) * images
    products = products_gib(config, size, images)
    memory = size.family.memory
    kept_scores = SCORES_GIB if machine.is_on_apple() and not memory else (0.0, 0.0)

    # Whole blocks are recomputed: little more than their inputs is kept.
    if config.gradient_checkpointing:
        recomputed = memory.recomputed_gib if memory else RECOMPUTED_GIB + kept_scores[1]
        return recomputed * scale * (PEFT_RECOMPUTED if is_pefts else 1) + products

    # A transformer was counted as a whole.
    if memory:
        return memory.full_gib * scale * (PEFT_STEP if is_pefts else 1)

    # The UNet's grows with the rank, of which patterns change the average.
    plain = adapter_parameters(replace(config, rank_pattern=()), size)
    rank = adapter * config.rank / max(1, plain)
    image = STEP_GIB + STEP_GIB_A_RANK * rank * size.adapted_layers / 560
    image *= PEFT_STEP if is_pefts else 1
    image += kept_scores[0] - (FEED_FORWARD_GIB if config.recompute_feed_forward else 0)
    text = TEXT_GIB * images * math.sqrt(size.unet / BaseSize().unet)
    casts = adapter * 2 / machine.GIB
    return image * scale + text + casts + products


def trained_texts_gib(config: table.TrainConfig, size: BaseSize) -> float:
    """What a step's prompts keep in text encoders for the backward pass; recomputed as much less as
    the UNet."""
    if not config.keeps_text_encoders:
        return 0.0
    is_recomputed = config.gradient_checkpointing and config.train_text_encoder
    prompts = config.images_a_pass * size.text_widths / BaseSize.text_widths
    kept = TRAINED_TEXT_GIB * prompts * BYTES[precision_of(config)] / 2
    return kept * (RECOMPUTED_GIB / STEP_GIB if is_recomputed else 1)


def disk_gib(
    config: table.TrainConfig, adapter: int, checkpoint_gib: float, total_steps: int
) -> float:
    """The disk space of a run, GiB.

    config: of the run
    adapter: its parameters, a count
    checkpoint_gib: of one checkpoint
    total_steps: optimizer steps
    """
    # Checkpoints, with one at the end if its step is no multiple.
    checkpoints, rest = divmod(total_steps, config.checkpointing_steps)
    checkpoints = min(checkpoints, config.checkpoints_total_limit or checkpoints) + (rest > 0)

    # Pictures: samples, and the class images that have no folder of the user's.
    subjects = config.each_subject
    times = 2 + total_steps // (config.validation_steps or max(1, total_steps))
    samples = len(subjects) * config.sample_count * times
    classes = {
        one.class_prompt for one in subjects if one.draws_class_images and not one.class_data_dir
    }
    pixels = (samples + len(classes) * config.num_class_images) * config.resolution**2

    # Published files, that of the best step beside the last.
    published = 2 if config.evaluate_steps else 1
    files = (published * adapter * 8 + pixels * PNG_BYTES_A_PIXEL) / machine.GIB
    return checkpoints * checkpoint_gib + files


def check_memory(config: table.TrainConfig, size: BaseSize) -> None:
    """Raises UserError, with settings that fit, for a base of known size that needs more memory
    than can be used, by the same bound as `--memory auto`."""
    need = estimate(config, size, 1).peak_gib
    is_known = size.is_measured or (bool(size.hub_id) and not size.is_assumed)
    if need < SMALL_GIB or not is_known:
        return
    free = free_gib_of_gpu()
    if free is not None and need > USABLE * free:
        of = f" of {size.family.title}" if size.family.memory else ""
        raise UserError(
            f"this run{of} needs about {need:.1f} GiB of GPU memory and {free:.1f} GiB are free, "
            f"of which it can use {USABLE * free:.1f}: {way_out(config, size, free)}"
        )


def free_gib_of_gpu() -> float | None:
    """`machine.free_gib` of this process's GPU; None without a GPU, or when accelerate is told to
    use the CPU. It includes the CUDA context, which asking the driver creates."""
    if machine.asks_accelerate("ACCELERATE_USE_CPU"):
        return None
    import torch  # not before it is needed: a dry run answers at once

    device = machine.best_device()
    if device.type != "cuda":
        return machine.free_gib(device)
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return machine.free_gib(own) + CONTEXT_GIB


def way_out(config: table.TrainConfig, size: BaseSize, free_gib: float) -> str:
    """The fewest changes to these settings that fit."""
    # A resumed run's plan is kept by the same word, so that another word must be named.
    is_kept = config.memory == "auto" and kept_plan(config) is not None
    start = without_plan(config) if is_kept else config
    for changes in ({}, {"sample_batch_size": 1}):
        # What `--memory auto` would choose with these changes.
        tried = replace(start, memory="auto", images_at_once=None, **changes)
        tried = replace(tried, **half_settings(tried, size.family, free_gib))
        word = plan_name(tried, size, free_gib) if is_kept else "auto"
        tried = replace(tried, **fitting_settings(tried, size, free_gib))
        cost = estimate(tried, size, 1).peak_gib
        if cost > USABLE * free_gib:
            continue

        # It fits: say the flags, or the one to leave out.
        flags = "".join(f" --{name} {value}" for name, value in changes.items())
        said = f"give --memory {word}{flags}"
        if config.memory == "auto" and config.images_at_once and not is_kept:
            said = "leave out --images_at_once"
            if flags:
                said += f" and give{flags}"
        return f"{said} (then {cost:.1f} GiB)."
    return f"give a smaller --resolution than {config.resolution}, or free the GPU."


@dataclass(frozen=True)
class Speed:
    """What is on.

    compiled: whether the blocks are
    searches: whether cuDNN searches algorithms
    """

    compiled: bool
    searches: bool

    def sentence(self) -> str:
        """The same in words, for a dry run and the log."""
        said = "transformer blocks compiled, which makes later steps faster"
        if not self.compiled:
            said = "transformer blocks not compiled, which pays in a longer run on a GPU"
        if self.searches:
            said += ", cuDNN searches algorithms"
        return said


def speed_of(config: table.TrainConfig, device_type: str, steps: int) -> Speed:
    """The choice for `steps` optimizer steps on such a device. `auto` never compiles a base in 4 or
    8 bit."""
    images = images_of(config, steps)
    pays = device_type == "cuda" and images >= WORTH_IMAGES
    by_itself = config.compile == "auto" and pays and config.base_quantization == "none"

    # A search is lost when sizes change, and may choose another algorithm the next time.
    is_fixed = not config.enable_bucket and not config.deterministic
    searches = pays and machine.searches_fast() and is_fixed
    return Speed(
        compiled=config.compile == "on" or by_itself,
        searches=searches,
    )


def speed_here(config: table.TrainConfig, steps: int) -> Speed:
    """The choice on this machine, for a dry run. It looks for a GPU only where that matters."""
    is_long = images_of(config, steps) >= WORTH_IMAGES
    is_on_gpu = is_long and not machine.asks_accelerate("ACCELERATE_USE_CPU")
    return speed_of(config, machine.best_device().type if is_on_gpu else "cpu", steps)


def images_of(config: table.TrainConfig, steps: int) -> float:
    """Images of 1024 px that so many steps pass through the denoiser."""
    images = steps * config.gradient_accumulation_steps * config.mean_images_a_micro_batch
    return images * (config.resolution / 1024) ** 2


def memory_settings(
    config: table.TrainConfig, base: Base, free_gib: float | None = None
) -> dict[str, Any]:
    """The settings that its `--memory` chooses; none without that option. `free_gib` is the GPU's,
    if another process will train; else all processes of the run must call it. Raises UserError for
    damaged files."""
    if config.memory is None:
        return {}
    free = least_free_gib() if free_gib is None else free_gib
    kept = kept_plan(config)
    if kept is not None:
        return kept
    size = size_of_base(base, config.target_modules)
    precision = half_settings(config, size.family, free)
    return precision | fitting_settings(replace(config, **precision), size, free)


def kept_plan(config: table.TrainConfig) -> dict[str, Any] | None:
    """What `--memory` chose for a run that goes on from a checkpoint with the same word: another
    plan would change the result's bytes. None for a fresh run, and for one that began with another
    word."""
    run_dir = RunDir(config.output_dir)
    if not config.resume_from_checkpoint or run_dir.latest_checkpoint() is None:
        return None
    with suppress(UserError):  # the folder has no settings
        saved = read_json(run_dir.config_path)
        if saved.get("memory") == config.memory:
            return {name: saved[name] for name in saved.keys() & still_open(config)}
    return None


def without_plan(config: table.TrainConfig) -> table.TrainConfig:
    """The same settings, with the defaults in place of what a plan sets."""
    names = [name for name in table.OF_PLANS if name != "images_at_once"]
    return replace(config, **{name: table.SETTINGS[name].default for name in names})


def still_open(config: table.TrainConfig) -> set[str]:
    """The settings that a word of `--memory` decides, but for those that were given."""
    decided = table.SETTINGS["memory"].metadata["replaces"]
    return {name for name in decided if not rules.given_flag(config, name)}


def half_settings(
    config: table.TrainConfig, facts: families.Facts, free_gib: float | None
) -> dict[str, str]:
    """Half precision on a GPU, if the family has one there, unless a precision was given."""
    is_given = config.mixed_precision is not None or precision_of(config) != "no"
    if free_gib is None or is_given:
        return {}
    return {"mixed_precision": machine.half_precision_of(facts)}


def fitting_settings(
    config: table.TrainConfig, size: BaseSize, free_gib: float | None
) -> dict[str, Any]:
    """The plan that `--memory` names, or with `auto` the first whose smallest pass fits, with its
    largest that fits."""
    passes = passes_of(config)
    plan = plan_settings(config, plan_name(config, size, free_gib))
    if free_gib is None:
        return plan
    for images in passes:
        tried = replace(config, **plan, **images)
        if estimate(tried, size, 1).peak_gib <= USABLE * free_gib:
            return plan | images
    return plan | passes[-1]


def plan_name(config: table.TrainConfig, size: BaseSize, free_gib: float | None) -> str:
    """The plan of `--memory`; for `auto`, the first whose smallest pass fits."""
    smallest = replace(config, **passes_of(config)[-1])
    return config.memory if config.memory != "auto" else fitting(smallest, size, free_gib)


def passes_of(config: table.TrainConfig) -> list[dict[str, int]]:
    """The passes to choose from, as settings: all images of a step together, half of them, and so
    on down to one; the given one, and a micro-batch where texts are trained, alone. A pass of one
    micro-batch sets nothing."""
    if config.images_at_once is not None or rules.excluded_by("images_at_once", config):
        return [{}]
    found = []
    images = config.gradient_accumulation_steps * config.images_a_micro_batch
    while images not in found:
        found.append(images)
        images = math.ceil(images / 2)
    usual = config.images_a_micro_batch
    return [{} if images == usual else {"images_at_once": images} for images in found]


def plan_settings(config: table.TrainConfig, name: str) -> dict[str, Any]:
    """What the plan adds to the given settings; int8 stays."""
    plan = dict(table.PLANS[name])
    if config.base_quantization != "none":
        plan.pop("base_quantization", None)
    return plan


def fitting(config: table.TrainConfig, size: BaseSize, free_gib: float | None) -> str:
    """The first plan that fits, or else the leanest possible one; a later check refuses that."""
    if free_gib is None:
        return "full"
    needs = costs(config, size)
    for name, cost in needs.items():
        if cost <= USABLE * free_gib:
            return name
    return list(needs)[-1]


def costs(config: table.TrainConfig, size: BaseSize) -> dict[str, float]:
    """Plan -> peak memory in GiB, for those that these settings and packages allow."""
    found = {}
    for name, plan in table.PLANS.items():
        if not is_possible(name, config, size.family):
            continue
        tried = replace(config, **plan_settings(config, name))
        # Blocks in half precision may need more than the host has; those in 4 bit take a quarter.
        is_dense_stream = "stream_blocks" in plan and "base_quantization" not in plan
        if is_dense_stream and streamed_gib(tried, size) > HOST_SHARE * host_gib():
            continue
        found[name] = estimate(tried, size, 1).peak_gib
    return found


def host_gib() -> float:
    """The memory of this machine, GiB."""
    return psutil.virtual_memory().total / machine.GIB


def is_possible(name: str, config: table.TrainConfig, facts: families.Facts) -> bool:
    """Whether a run can take this plan, with its settings, its family and the packages here."""
    plan = table.PLANS[name]
    # Apple's attention keeps all scores unless blocks are recomputed; it has no bitsandbytes, and
    # its GPU computes in the host's memory.
    is_quantized, is_streamed = "base_quantization" in plan, "stream_blocks" in plan
    if machine.is_on_apple():
        return "gradient_checkpointing" in plan and not is_quantized and not is_streamed
    if is_quantized and (config.cache_cross_attention or not find_spec("bitsandbytes")):
        return False
    if is_streamed and (config.base_quantization == "int8" or config.use_dora):
        return False
    # Streaming was tried in one process alone.
    if is_streamed and process_count() > 1:
        return False
    if facts.style == "flow" and any(setting in families.OF_UNETS for setting in plan):
        return False
    is_cached = "cache_cross_attention" in plan
    return not is_cached or not rules.excluded_by("cache_cross_attention", config)


def leaner(config: table.TrainConfig, facts: families.Facts) -> tuple[str, dict[str, Any]] | None:
    """What takes less memory than these settings, of what a loaded base can change to: as a flag,
    and as settings. First half as many images at once, which computes nothing twice, then the next
    plan. None if nothing is left."""
    images = math.ceil(config.images_a_pass / 2)
    if images < config.images_a_pass and not rules.excluded_by("images_at_once", config):
        return f"--images_at_once {images}", {"images_at_once": images}

    plans = [name for name in OF_A_LOADED_BASE if is_possible(name, config, facts)]
    # DoRA's magnitudes are those of the dense weights, and streamed ones cannot be quantised.
    if config.use_dora or config.stream_blocks:
        plans = [name for name in plans if "base_quantization" not in table.PLANS[name]]

    # Go on after the leanest plan whose settings the run has.
    later = plans
    for place, name in enumerate(plans):
        settings = plan_settings(config, name)
        if all(getattr(config, key) == value for key, value in settings.items()):
            later = plans[place + 1 :]
    if not later:
        return None

    # A block that is recomputed as a whole would recompute its feed-forward part twice.
    settings = {"recompute_feed_forward": False} | plan_settings(config, later[0])
    return f"--memory {later[0]}", settings


def plan_lines(config: table.TrainConfig, size: BaseSize) -> list[str]:
    """For `--dry_run`: what each plan would need, and what the GPU has free."""
    if config.memory is None:
        return []
    free = free_gib_of_gpu()
    plans = costs(without_plan(config), size)
    needs = ", ".join(f"{name} {cost:.1f} GiB" for name, cost in plans.items())
    has = "there is no GPU here" if free is None else f"{free:.1f} GiB are free"
    passes = (
        f"{config.images_a_pass} of a step's "
        f"{config.images_a_micro_batch * config.gradient_accumulation_steps}"
    )
    return [
        f"memory plans: {needs}; {has}; {passes} images pass at once (--memory {config.memory})"
    ]


def is_alone() -> bool:
    """Whether a launcher started no other process of this run."""
    return process_count() < 2


def same_for_all(find: Callable[[], Result], words: Callable[[Result], str]) -> Result:
    """What each process finds. Raises UserError on all where one has other `words`, or where `find`
    raises it."""
    if is_alone():
        return find()
    from dreambooth_moslora.plan.distributed import agreed, joined

    return agreed(joined(), find, words, "give all processes the same flags and files.")


def check_same(config: table.TrainConfig) -> None:
    """Raises UserError on all processes where one has other settings."""
    same_for_all(lambda: config, lambda own: in_lines(own.to_dict()))


def by_all(check: Callable[[], Result]) -> Result:
    """What `check` returns. Its error in one process is raised on all."""
    if is_alone():
        return check()
    from dreambooth_moslora.plan.distributed import joined, on_each

    return on_each(joined(), check)


def in_lines(settings: Mapping[str, Any]) -> str:
    """A line for each setting that the processes must share, given or not."""
    apart = {*table.named("secret"), *table.named("per_process")}
    lines = []
    for name, item in table.SETTINGS.items():
        if name not in apart:
            value = table.checked_setting(name, settings.get(name, item.default))
            lines.append(f"--{name} {value!r}")
    return "\n".join(lines)


def least_free_gib() -> float | None:
    """`free_gib_of_gpu` of the process that has the least, so that all choose the same. All must
    call it."""
    own = free_gib_of_gpu()
    if is_alone():
        return own
    from dreambooth_moslora.plan.distributed import exchange, joined

    told = exchange(joined(), [own], None)
    return min((free for free in told if free is not None), default=None)
