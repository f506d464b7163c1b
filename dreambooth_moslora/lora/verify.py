"""Check of an export: a stock loader reads the file back, in diffusers' or kohya's names, and must
compute the same.

diffusers' own `load_lora_weights` loads the file into an empty copy of the adapted models, so that
memory never holds a second UNet. ΔW of every projection, as PEFT computes it on both sides, and
DoRA's magnitudes are compared in fp32 by the relative difference ‖file − live‖ / ‖live‖.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dreambooth_moslora.base.load import get_pipeline_class
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import empty_models, key_names, raw_file, safetensors_file
from dreambooth_moslora.lora.key_names import KOHYA_KEYS
from dreambooth_moslora.method.mixer import Components, Tensors
from dreambooth_moslora.settings.family_facts import DENOISERS, get_denoiser_facts

MAX_DIFFERENCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative difference of ΔW that rounding `up` and `down` to a dtype explains."""
STOCK_ADAPTER = "proof"
MAX_ERROR_CHARACTERS = 200
"""Characters that are shown of the end of a loader's error: the start is a dump of the pipeline."""


@dataclass(frozen=True)
class FileProof:
    """Comparison of one file with the live adapter."""

    file: str
    largest: float  # relative difference, at `worst`
    worst: str
    loader: str


@dataclass(frozen=True)
class Proof:
    """Comparison of all files that `publish` wrote."""

    dtype: str
    bound: float
    projections: int
    file_proofs: tuple[FileProof, ...]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(p.file for p in self.file_proofs)

    @property
    def max_relative_difference(self) -> float:
        return max(p.largest for p in self.file_proofs)

    def to_dict(self) -> dict[str, object]:
        return {
            **asdict(self),
            "files": self.files,
            "max_relative_difference": self.max_relative_difference,
        }

    def describe(self) -> str:
        return (
            f"{self.projections} projections reloaded by the stock loader: "
            "largest relative difference "
            f"{self.max_relative_difference:.1e} (bound {self.bound:.0e} for {self.dtype})"
        )


def compute_relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖.

    It is 0 if both are zero, and infinite if only `expected` is zero, or for NaN.
    """
    size, difference = float(expected.norm()), float((actual - expected).norm())
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and difference == difference else float("inf")


@contextmanager
def disable_tf32() -> Iterator[None]:
    """Compute fp32 products in full precision, without TF32, and restore PyTorch's switches
    afterwards."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


@torch.no_grad()
@disable_tf32()
def verify_file(path: Path, components: Components, adapter_name: str) -> FileProof:
    """Reload a published file and compare it with the live adapter.

    Raises UserError if the stock loader refuses it or adapts other modules.
    """
    # The layers on both sides
    live = raw_file.get_all_layers(components, adapter_name)
    tensors, _ = safetensors_file.read_tensors(path)

    # diffusers drops `dora_scale`, so no stock loader reads these files whole.
    if any(key.endswith(".dora_scale") for key in tensors):
        return verify_kohya_dora(path, tensors, live, adapter_name)
    stock = load_stock_layers(path, components)
    if missing := sorted(set(live) ^ set(stock)):
        raise UserError(
            f"{path.name}: the stock loader adapts other modules than the adapter does, "
            f"first {missing[0]}"
        )

    # ΔW of each layer, and DoRA's magnitudes
    differences = {}
    for name, layer in live.items():
        reloaded = stock[name]
        expected = get_delta(layer, adapter_name)
        differences[name] = compute_relative_difference(
            get_delta(reloaded, STOCK_ADAPTER), expected
        )
        if adapter_name in layer.lora_magnitude_vector:
            magnitude = reloaded.lora_magnitude_vector[STOCK_ADAPTER].weight.float().cpu()
            expected_magnitude = layer.lora_magnitude_vector[adapter_name].weight.float().cpu()
            differences[name] = max(
                differences[name], compute_relative_difference(magnitude, expected_magnitude)
            )
    return build_file_proof(differences, file=path.name, loader="diffusers load_lora_weights")


def build_file_proof(differences: dict[str, float], file: str, loader: str) -> FileProof:
    """Return the proof of a file with the largest of its differences.

    differences: layer or tensor -> relative difference
    file: its name
    loader: what read it back
    """
    worst = max(differences, key=differences.__getitem__)
    return FileProof(file=file, largest=differences[worst], worst=worst, loader=loader)


def load_stock_layers(path: Path, components: Components) -> dict[str, LoraLayer]:
    """Return the layers of a stock diffusers pipeline that loaded the file.

    Raises UserError if it refuses the file.
    """
    # Empty copies of the models, in the pipeline of their family
    denoiser = next((components[name] for name in DENOISERS if name in components), None)
    if denoiser is None:
        raise UserError(
            "a LoRA file is loaded through the denoiser; "
            "give `unet` or `transformer` among the components"
        )
    twins = {
        name: empty_models.build_empty_model(empty_models.get_model_config(model))
        for name, model in components.items()
    }
    facts = get_denoiser_facts(type(denoiser).__name__, denoiser.config)
    pipeline_class = get_pipeline_class(facts)
    expected, _ = pipeline_class._get_signature_keys(pipeline_class)

    # Some pipelines cannot be constructed without all their parts, which the loader does not need.
    # The loader warns of each component that gets no adapter.
    with silence_libraries():
        pipeline = pipeline_class.__new__(pipeline_class)
        pipeline.register_modules(**dict.fromkeys(expected) | twins)
        try:
            pipeline.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
                adapter_name=STOCK_ADAPTER,
                local_files_only=True,
            )
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path.name} was not published: the stock loader refuses it: "
                f"{format_error_end(error)} "
                "(probably a bug of ours; a training's checkpoints are kept, and it goes on with "
                "--resume_from_checkpoint latest)"
            ) from error
    adapted = {name: twin for name, twin in twins.items() if hasattr(twin, "peft_config")}
    return raw_file.get_all_layers(adapted, STOCK_ADAPTER)


def format_error_end(error: Exception) -> str:
    """Return the end of the loader's error, as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARACTERS else "…" + text[1 - MAX_ERROR_CHARACTERS :]


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide warnings and progress bars of libraries within the block."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(disabled_level)


def get_delta(layer: LoraLayer, adapter_name: str) -> Tensor:
    """Return ΔW in the shape of W, as PEFT computes it, in fp32 on the CPU."""
    return layer.get_delta_weight(adapter_name).float().cpu()


def verify_kohya_dora(
    path: Path, tensors: Tensors, live: dict[str, LoraLayer], adapter_name: str
) -> FileProof:
    """Compare ΔW and DoRA's magnitudes as kohya's file defines them."""
    differences = {}
    components = {name.partition(".")[0] for name in live}
    for name, layer in live.items():
        # The layer in the file, under kohya's name
        component, module = name.split(".", 1)
        kohya_name = key_names.format_kohya_name(
            component, key_names.get_published_path(component, module), components
        )
        up, down, alpha, dora_scale = (
            tensors[key_names.format_key(KOHYA_KEYS, kohya_name, part)].double()
            for part in ("up", "down", "alpha", "dora_scale")
        )

        # The live layer
        expected = get_delta(layer, adapter_name)
        magnitude = layer.lora_magnitude_vector[adapter_name].weight.cpu()[:, None]
        differences[name] = max(
            compute_relative_difference(float(alpha) / len(down) * up @ down, expected.double()),
            compute_relative_difference(dora_scale, magnitude.double()),
        )
    return build_file_proof(differences, file=path.name, loader="the definition of dora_scale")
