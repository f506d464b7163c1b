"""Verifies an export: a stock loader reads the file back, in diffusers' or kohya's names, and must
compute the same.

diffusers' own `load_lora_weights` loads the file into an empty copy of the adapted models, so that
memory never holds a second UNet. Compared are, relative (‖file − live‖ / ‖live‖), in fp32: ΔW of
every projection, as PEFT computes it on both sides, and DoRA's magnitudes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import diffusers
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import key_names, raw_file
from dreambooth_moslora.lora.key_names import KOHYA_KEYS
from dreambooth_moslora.method.mixer import Components, Tensors
from dreambooth_moslora.settings.family_facts import DENOISERS, get_denoiser_facts

# Of ΔW, by rounding up and down
MAX_DIFFERENCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
STOCK_ADAPTER = "proof"
# Of the loader's text: its cause stands at its end, behind a dump of the pipeline.
MAX_ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class FileProof:
    """The comparison of one file."""

    file: str
    largest: float  # relative difference, at `worst`
    worst: str
    loader: str


@dataclass(frozen=True)
class Proof:
    dtype: str
    bound: float
    projections: int
    file_proofs: tuple[FileProof, ...]  # of the files that `publish` wrote
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
    """‖found − expected‖ / ‖expected‖; 0 if both are zero, infinite if only `expected` is, or for
    NaN."""
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
    """Reload `path` and compare it with the live adapter. Raises UserError."""
    # The layers on both sides
    live = raw_file.get_all_layers(components, adapter_name)
    tensors, _ = raw_file.read_tensors(path)
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
        other = stock[name]
        wanted = get_delta(layer, adapter_name)
        differences[name] = compute_relative_difference(get_delta(other, STOCK_ADAPTER), wanted)
        if adapter_name in layer.lora_magnitude_vector:
            found = other.lora_magnitude_vector[STOCK_ADAPTER].weight.float().cpu()
            trained = layer.lora_magnitude_vector[adapter_name].weight.float().cpu()
            differences[name] = max(differences[name], compute_relative_difference(found, trained))
    return build_file_proof(differences, file=path.name, loader="diffusers load_lora_weights")


def build_file_proof(differences: dict[str, float], file: str, loader: str) -> FileProof:
    """The proof of a file whose layers, or tensors, differ so."""
    worst = max(differences, key=differences.__getitem__)
    return FileProof(file=file, largest=differences[worst], worst=worst, loader=loader)


def load_stock_layers(path: Path, components: Components) -> dict[str, LoraLayer]:
    """Layers of a stock diffusers pipeline that loaded the file. Raises UserError if it refuses."""
    denoiser = next((components[name] for name in DENOISERS if name in components), None)
    if denoiser is None:
        raise UserError(
            "a LoRA file is loaded through the denoiser; "
            "give `unet` or `transformer` among the components"
        )
    twins = {
        name: raw_file.build_empty_model(raw_file.get_model_config(model))
        for name, model in components.items()
    }
    kind = getattr(diffusers, get_denoiser_facts(type(denoiser).__name__, denoiser.config).pipeline)
    expected, _ = kind._get_signature_keys(kind)
    parts = dict.fromkeys(expected)
    # Some pipelines cannot be made without all their parts, none of which the loader needs. The
    # loader says of each component that it got no adapter.
    with silence_libraries():
        shell = kind.__new__(kind)
        shell.register_modules(**parts | twins)
        try:
            shell.load_lora_weights(
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
    """The last words of the loader's error, as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARACTERS else "…" + text[1 - MAX_ERROR_CHARACTERS :]


@contextmanager
def silence_libraries() -> Iterator[None]:
    """In this block no library warns or shows a bar."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


def get_delta(layer: LoraLayer, adapter_name: str) -> Tensor:
    """ΔW, in the shape of W, by PEFT, in fp32 on the CPU."""
    return layer.get_delta_weight(adapter_name).float().cpu()


def verify_kohya_dora(
    path: Path, tensors: Tensors, live: dict[str, LoraLayer], adapter_name: str
) -> FileProof:
    """Compare ΔW and DoRA's magnitudes as the file defines them."""
    differences = {}
    components = {name.partition(".")[0] for name in live}
    for name, layer in live.items():
        # What the file has of the layer, under kohya's name.
        component, module = name.split(".", 1)
        named = key_names.format_kohya_name(
            component, key_names.get_published_path(component, module), components
        )
        up, down, alpha, found_size = (
            tensors[key_names.format_key(KOHYA_KEYS, named, part)].double()
            for part in ("up", "down", "alpha", "dora_scale")
        )

        # What the live layer computes with.
        wanted = get_delta(layer, adapter_name)
        size = layer.lora_magnitude_vector[adapter_name].weight.cpu()[:, None]
        differences[name] = max(
            compute_relative_difference(float(alpha) / len(down) * up @ down, wanted.double()),
            compute_relative_difference(found_size, size.double()),
        )
    return build_file_proof(differences, file=path.name, loader="the definition of dora_scale")
