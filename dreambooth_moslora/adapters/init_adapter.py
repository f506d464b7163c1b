"""Starts an adapter from an existing LoRA file of any program.

    ΔW of the file = s·B·M₀·A        A := down,  M := M₀ as the run starts it,  B := up·M₀⁻¹ / s

A file of lower rank fills the first rows of A, and the others keep their start; a file of higher rank is
reduced by SVD. Before the first step, each layer's ΔW as PEFT computes it is compared with the file's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer

from dreambooth_moslora.adapters import describe, lora_file, metadata, mixer, moslora, proof, raw_file
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import find_weights

BOUND, BOUND_KAIMING = 1e-5, 1e-3  # fp32's rounding, and its amplification by a badly conditioned mixer


@dataclass(frozen=True)
class Start:
    file_name: str
    layers: int
    deviation: float  # largest relative difference of ΔW from the file's
    kept: float  # of the file's Σ‖ΔW‖², by the run's ranks
    anew: tuple[str, ...]  # layers (`component.path`) that the file lacks
    left_out: tuple[str, ...]  # layers of the file that are not trained

    def sentence(self) -> str:
        parts = [f"{self.layers} layers go on from it, largest relative deviation {self.deviation:.1e}"]
        if self.kept < 1:
            parts.append(f"the lower rank keeps {self.kept:.2%} of its squared norm")
        if self.anew:
            parts.append(f"{shortened(self.anew)} not in the file: they begin anew")
        if self.left_out:
            parts.append(f"{shortened(self.left_out)} of the file not trained here: they are left out")
        return f"--init_adapter {self.file_name}: {'; '.join(parts)}."


def shortened(names: tuple[str, ...]) -> str:
    more = ", …" if len(names) > 1 else ""
    return f"{len(names)} layers ({names[0]}{more}) are"


def read_start(
    path: str | Path, pipeline: StableDiffusionXLPipeline, base_name: str, use_dora: bool
) -> lora_file.AdapterWeights:
    """The file's content. Raises UserError for another base's, and for what no adapter of the run can hold."""
    try:
        weights = lora_file.read_adapter(path, pipeline)
        lora_file.check_fits(weights, pipeline, base_name)
    except UserError as error:
        raise UserError(f"--init_adapter: {error}") from error
    name = f"--init_adapter {weights.file_name}"
    try:
        metadata.check_start_file(find_weights(path))
    except UserError as error:
        raise UserError(f"{name}: {error}.") from error
    found = [projection for projections, _ in weights.parts.values() for projection in projections.values()]
    if any(projection.bias is not None for projection in found):
        raise UserError(f"{name}: its layers have biases, which this adapter has not.")
    has_dora = any(projection.magnitude is not None for projection in found)
    if has_dora != use_dora:
        what = "it holds DoRA: give --use_dora" if has_dora else "it holds no DoRA: leave --use_dora out"
        raise UserError(f"{name}: {what}.")
    return weights


@torch.no_grad()
@proof.full_fp32()
def begin_with(
    weights: lora_file.AdapterWeights, components: dict[str, torch.nn.Module], adapter_name: str = "default"
) -> Start:
    """Copy the file's update into a fresh adapter and verify it. Raises UserError without a common layer."""
    live = raw_file.all_layers(components, adapter_name)
    update = {
        f"{component}.{path}": (projection, scales.of(path, projection.rank))
        for component, (found, scales) in weights.parts.items()
        for path, projection in found.items()
    }
    common = [path for path in live if path in update]
    if not common:
        first = f"it holds {min(update)}, the run trains {min(live)}"
        raise UserError(f"--init_adapter {weights.file_name}: no layer of it is trained here ({first}).")
    figures = {path: begin_layer(live[path], adapter_name, *update[path]) for path in common}
    before, kept = (sum(figure[place] for figure in figures.values()) for place in (1, 2))
    worst = max(common, key=lambda path: figures[path][0])
    anew, left_out = (tuple(p for p in one if p not in other) for one, other in ((live, update), (update, live)))
    start = Start(weights.file_name, len(common), figures[worst][0], kept / before if before else 1.0, anew, left_out)
    kinds = {getattr(model.peft_config[adapter_name], "mixer", "none") for model in components.values()}
    bound = BOUND_KAIMING if "kaiming" in kinds else BOUND
    if not start.deviation <= bound:
        raise UserError(
            f"--init_adapter {weights.file_name}: {worst} would begin {start.deviation:.1e} (relative) away "
            f"from the file, and rounding explains {bound:.0e}: give --mixer orthogonal, which is exact."
        )
    return start


def begin_layer(
    layer: LoraLayer, adapter_name: str, projection: mixer.LowRank, scale: float
) -> tuple[float, float, float]:
    """(relative difference of the layer's ΔW from the update in its rank, ‖ΔW‖² of the file, and what is kept)."""
    own = moslora.matrices_of(layer, adapter_name)
    wanted, before, kept = of_rank(projection, scale, own.down)
    up = wanted.up / own.scale
    if own.mixer is not None:
        up = torch.linalg.solve(own.mixer.cpu().double(), up, left=False)
    parts = {"lora_A": wanted.down.view(own.down.shape), "lora_B": up, "mixer": own.mixer}
    if projection.magnitude is not None:
        parts["magnitude"] = projection.magnitude.flatten()
    raw_file.fill(layer, adapter_name, parts)
    with proof.alone(layer, adapter_name):
        found = proof.delta(layer, adapter_name)
    return proof.relative_difference(found.flatten(1), wanted.delta), before, kept


def of_rank(projection: mixer.LowRank, scale: float, own: torch.Tensor) -> tuple[mixer.LowRank, float, float]:
    """The update in the rank of the layer's `own` A (r, …), flattened, in fp64; ‖ΔW‖² before and after."""
    down, up = projection.down.double().flatten(1), scale * projection.up.double().flatten(1)
    used = (down != 0).any(1) | (up != 0).any(0)  # rows that are zero on both sides would never learn
    down, up, rank = down[used], up[:, used], len(own)
    if len(down) > rank:
        left, sizes, right = describe.product_svd(up, down)
        before, kept = float(sizes.square().sum()), float(sizes[:rank].square().sum())
        up, down = describe.leading_part(left, sizes, right, rank)
    else:
        before = kept = float(((up.T @ up) * (down @ down.T)).sum())
    own = own.detach().cpu().double().flatten(1)
    missing = up.new_zeros(len(up), rank - len(down))
    return mixer.LowRank(torch.cat([down, own[len(down) :]]), torch.cat([up, missing], dim=1)), before, kept
