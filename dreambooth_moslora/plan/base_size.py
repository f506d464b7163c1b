"""Count a base's parameters, and those of the layers that get an adapter, in its files or by its
family's published models."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.devices import OUTPUTS_PER_BLOCK
from dreambooth_moslora.settings import family_facts, field_facts

DEFAULT_MODEL = family_facts.SDXL.models[0]
"""Whose counts an unknown base is taken to have."""
FLOW_BLOCK_PATH = re.compile(
    r"(\w*transformer_blocks|layers|\w*refiner|\w*mode_blocks(\.\w+)?)\.\d+\."
)
UNET_BLOCK_PATH = re.compile(r".*transformer_blocks\.\d+\.")
"""Paths of a denoiser's repeated blocks, whose linear layers are quantised."""


@dataclass(frozen=True)
class BaseSize:
    """Counts of a base's parameters. `adapted_widths` sums (in + out) over the `adapted_layers`
    that get an adapter. `projections` counts the UNet's parameters that quantisation replaces,
    `streamed` those that `--stream_blocks` keeps on the host, and `largest_block` those of one
    block. For a convolution (out, in, h, w), in is in·h·w."""

    unet: int = DEFAULT_MODEL.parameters
    projections: int = DEFAULT_MODEL.block_parameters
    streamed: int = DEFAULT_MODEL.block_parameters
    largest_block: int = DEFAULT_MODEL.largest_block
    text_encoders: int = DEFAULT_MODEL.encoders
    vae: int = DEFAULT_MODEL.vae
    adapted_widths: int = DEFAULT_MODEL.adapted_widths
    adapted_layers: int = DEFAULT_MODEL.adapted_layers
    is_measured: bool = False
    widths: tuple[tuple[str, int], ...] = ()
    """Path and in + out of each layer that gets an adapter, where known."""
    family: family_facts.FamilyFacts = family_facts.SDXL
    hub_id: str = ""  # Of the known model, where its files are not here.
    # Whether the base is another model than that one, whose size is not known.
    is_assumed: bool = False
    text_layers: int = sum(count for count, _ in family_facts.CLIP_LAYERS.values())
    text_widths: int = sum(width for _, width in family_facts.CLIP_LAYERS.values())
    """The same of the text encoders' layers that get an adapter if those are trained."""


def find_base_size(base: Base, target_modules: tuple[str, ...]) -> BaseSize:
    """Return the size of a base with the adapter on these layers, counted in its files where they
    are complete.

    Else it is taken from the published model with its id, or for a single file from the one nearest
    in size, with the adapter on the family's usual layers. For another base it is that of the
    largest model of its family, or of SDXL where the family is not known. Raises UserError for
    damaged files.
    """
    if base.shapes and all(base.shapes.values()):
        return compute_base_size(base.facts, base.shapes, target_modules)

    # Which model it is, or is nearest to.
    facts, model = base.published or (base.facts, None)
    if base.file:
        count = sum(map(math.prod, base.tensors.values()))
        nearest = min(facts.models, key=lambda model: abs(model.parameters - count))
        model = None if facts == family_facts.SDXL else nearest
    if facts in (None, family_facts.SDXL):
        return BaseSize(hub_id=model.hub_id if model else "", is_assumed=facts is None)
    is_assumed = model is None
    model = model or max(facts.models, key=lambda candidate: candidate.parameters)

    clip = [family_facts.CLIP_LAYERS[name] for name in facts.adapted_encoders]
    return BaseSize(
        unet=model.parameters,
        projections=model.block_parameters,
        streamed=model.streamed or model.block_parameters,
        largest_block=model.largest_block,
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


def compute_base_size(
    facts: family_facts.FamilyFacts,
    shapes: Mapping[str, dict[str, list[int]]],
    target_modules: tuple[str, ...],
) -> BaseSize:
    """Return the size of a base, counted by the shapes of each part's weights; a part may be
    missing."""
    count = {
        part: sum(map(math.prod, part_shapes.values())) for part, part_shapes in shapes.items()
    }
    texts = sum(count.get(part, 0) for part in facts.encoders)

    # The denoiser's layers, and those that get an adapter.
    layers = {}
    for name, shape in shapes[facts.denoiser].items():
        if name.endswith(".weight") and len(shape) > 1:
            layers[name.removesuffix(".weight")] = shape
    widths = tuple(
        (path, shape[0] + math.prod(shape[1:]))
        for path, shape in layers.items()
        if field_facts.is_adapted(path, target_modules)
    )

    # Those of each block that quantisation replaces, as `base.quantization` chooses them.
    pattern = FLOW_BLOCK_PATH if facts.style == "flow" else UNET_BLOCK_PATH
    blocks: Counter[str] = Counter()
    for path, shape in layers.items():
        block = pattern.match(path)
        if block and len(shape) == 2 and shape[0] % OUTPUTS_PER_BLOCK == 0:
            blocks[block[0]] += math.prod(shape)

    # Of these, the blocks that `base.streaming` streams.
    streamed = [number for block, number in blocks.items() if "refiner" not in block]

    # The layers of the text encoders that `--train_text_encoder` adapts.
    clip_widths = []
    for part in facts.adapted_encoders:
        for name, shape in shapes.get(part, {}).items():
            if field_facts.is_adapted(name.removesuffix(".weight"), field_facts.TEXT_PROJECTIONS):
                clip_widths.append(sum(shape))

    return BaseSize(
        unet=count[facts.denoiser],
        projections=sum(blocks.values()),
        streamed=sum(streamed),
        largest_block=max(streamed, default=0),
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
