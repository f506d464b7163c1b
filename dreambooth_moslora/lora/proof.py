"""Verifies an export: a stock loader reads the file back, in diffusers' or kohya's names, and must
compute the same.

diffusers' own `load_lora_weights` loads the file into an empty copy of the adapted models, so that
memory never holds a second UNet. Compared are, relative (‖file − live‖ / ‖live‖), in fp32, at scale
1: ΔW of every projection, as PEFT computes it on both sides, DoRA's magnitudes, and the outputs of
a few projections on fixed inputs.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import diffusers
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.lora import key_names, raw_file
from dreambooth_moslora.lora.key_names import KOHYA_KEYS
from dreambooth_moslora.method.mixer import Components, Tensors
from dreambooth_moslora.settings.families import DENOISERS, facts_of_model

# Of ΔW, by rounding up and down
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SAMPLED_LAYERS = 8
TOKENS = 16
STOCK = "proof"


@dataclass(frozen=True)
class FileProof:
    file: str
    weights: float  # largest relative difference of ΔW, at `worst`
    outputs: float  # of outputs
    worst: str
    loader: str

    @property
    def largest(self) -> float:
        return max(self.weights, self.outputs)


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

    def sentence(self) -> str:
        return (
            f"{self.projections} projections reloaded by the stock loader: "
            "largest relative difference "
            f"{self.max_relative_difference:.1e} (bound {self.bound:.0e} for {self.dtype})"
        )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; 0 if both are zero, infinite if only `expected` is, or for
    NaN."""
    size, difference = float(expected.norm()), float((found - expected).norm())
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and difference == difference else float("inf")


@contextmanager
def full_fp32() -> Iterator[None]:
    """Compute fp32 products in full precision, without TF32, and restore PyTorch's settings
    afterwards. Where its older switches and its settings contradict each other, reading a switch
    raises RuntimeError in any library."""
    backends = torch.backends
    newer = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    settings = [(switch, "allow_tf32", False) for switch in (backends.cuda.matmul, backends.cudnn)]
    # later, as each switch changes some
    settings += [(setting, "fp32_precision", "ieee") for setting in newer]
    before = []
    for backend, name, _ in settings:
        with suppress(RuntimeError):  # the newer settings contradict this switch
            before.append((backend, name, getattr(backend, name)))
    try:
        for backend, name, exact in settings:
            setattr(backend, name, exact)
        yield
    finally:
        for backend, name, value in before:
            setattr(backend, name, value)


@torch.no_grad()
@full_fp32()
def prove_file(path: Path, components: Components, adapter_name: str) -> FileProof:
    """Reload `path` and compare it with the live adapter. Raises UserError."""
    live = raw_file.all_layers(components, adapter_name)
    tensors, _ = raw_file.read_tensors(path)
    if any(key.endswith(".dora_scale") for key in tensors):
        return prove_kohya_dora(path, tensors, live, adapter_name)
    stock = stock_layers(path, components)
    if missing := sorted(set(live) ^ set(stock)):
        raise UserError(
            f"{path.name}: the stock loader adapts other modules than the adapter does, "
            f"first {missing[0]}"
        )
    differences = {}
    for name, layer in live.items():
        with alone(layer, adapter_name), alone(stock[name], STOCK):
            wanted = delta(layer, adapter_name)
            differences[name] = relative_difference(delta(stock[name], STOCK), wanted)
            if adapter_name in layer.lora_magnitude_vector:
                pair = (
                    stock[name].lora_magnitude_vector[STOCK],
                    layer.lora_magnitude_vector[adapter_name],
                )
                sizes = (module.weight.float().cpu() for module in pair)
                differences[name] = max(differences[name], relative_difference(*sizes))
    names = list(live)
    spread = names[:: max(1, (len(names) - 1) // (SAMPLED_LAYERS - 1))][: SAMPLED_LAYERS - 1]
    outputs = max(output_difference(live[n], stock[n], adapter_name) for n in (*spread, names[-1]))
    worst = max(differences, key=differences.__getitem__)
    return FileProof(path.name, differences[worst], outputs, worst, "diffusers load_lora_weights")


def stock_layers(path: Path, components: Components) -> dict[str, LoraLayer]:
    """Layers of a stock diffusers pipeline that loaded the file. Raises UserError if it refuses or
    warns."""
    denoiser = next((components[name] for name in DENOISERS if name in components), None)
    if denoiser is None:
        raise UserError(
            "a LoRA file is loaded through the denoiser; "
            "give `unet` or `transformer` among the components"
        )
    twins = {
        name: raw_file.empty_model(raw_file.model_config(model))
        for name, model in components.items()
    }
    kind = getattr(diffusers, facts_of_model(type(denoiser).__name__, denoiser.config).pipeline)
    names = inspect.signature(kind.__init__).parameters.items()
    parts = {
        name: None
        for name, parameter in names
        if parameter.default is parameter.empty and name != "self"
    }
    with collected_warnings():  # of a pipeline without a safety checker
        shell = kind(**parts | twins)
    with collected_warnings() as warnings:
        try:
            shell.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=STOCK, local_files_only=True
            )
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path.name} was not published: the stock loader refuses it: {one_line(error)}"
            ) from error
    # The loader announces components without an adapter; missing ones are found by comparing the
    # layers.
    if warnings := [text for text in warnings if not text.startswith("No LoRA keys associated")]:
        raise UserError(
            f"{path.name}: the stock loader complains: {' '.join(warnings[0].split())[:200]}"
        )
    return raw_file.all_layers(
        {n: twin for n, twin in twins.items() if hasattr(twin, "peft_config")}, STOCK
    )


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the loaders' warnings about unused keys, which would otherwise appear in the user's
    terminal."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [(log.handlers[:], log.propagate) for log in loggers]
    for log in loggers:
        log.handlers[:], log.propagate = [handler], False
    try:
        with redirect_stderr(StringIO()):  # progress bars
            yield found
    finally:
        for log, (handlers, propagate) in zip(loggers, before, strict=True):
            log.handlers[:], log.propagate = handlers, propagate


@contextmanager
def alone(layer: LoraLayer, adapter_name: str, base: nn.Module | None = None) -> Iterator[None]:
    """The layer in evaluation mode with this adapter only, at its trained scale, over `base` if
    given."""
    saved = (
        layer.base_layer,
        layer._active_adapter,
        layer._disable_adapters,
        layer.scaling[adapter_name],
    )
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    layer._active_adapter, layer._disable_adapters = [adapter_name], False
    layer.set_scale(adapter_name, 1.0)
    layer.base_layer = base if base is not None else layer.base_layer
    try:
        yield
    finally:
        (
            layer.base_layer,
            layer._active_adapter,
            layer._disable_adapters,
            layer.scaling[adapter_name],
        ) = saved
        for module, mode in modes:
            module.training = mode


def delta(layer: LoraLayer, adapter_name: str) -> Tensor:
    """ΔW, in the shape of W, by PEFT, in fp32 on the CPU."""
    return layer.get_delta_weight(adapter_name).float().cpu()


def output_difference(live: LoraLayer, stock: LoraLayer, adapter_name: str) -> float:
    """The relative difference of the layers' outputs for a fixed x (16, in), or (1, in, 4, 4). The
    base is zero, as the effect of an early adapter would vanish in the rounding of W·x; DoRA needs
    a base."""
    device = live.lora_A[adapter_name].weight.device
    is_convolution = isinstance(live.get_base_layer(), nn.Conv2d)
    shape = (1, live.in_features, 4, TOKENS // 4) if is_convolution else (TOKENS, live.in_features)
    x, base = torch.randn(shape, generator=torch.Generator().manual_seed(1)), fixed_base(live)
    if adapter_name not in live.lora_magnitude_vector:
        nn.init.zeros_(base.weight)
    with alone(stock, STOCK, base):
        found = stock(x).float()
    with alone(live, adapter_name, base.to(device)):
        wanted = live(x.to(device)).float().cpu()
    return relative_difference(found, wanted)


def fixed_base(layer: LoraLayer) -> nn.Linear | nn.Conv2d:
    """A layer of the base's kind with gaussian weights of seed 0, scaled to keep the input's
    norm."""
    kind, options, real = nn.Linear, {}, layer.get_base_layer()
    if isinstance(real, nn.Conv2d):
        kind, options = (
            nn.Conv2d,
            {name: getattr(real, name) for name in ("kernel_size", "stride", "padding")},
        )
    base = kind(
        layer.in_features, layer.out_features, bias=False, device="meta", **options
    ).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(base.weight, std=base.weight[0].numel() ** -0.5, generator=generator)
    return base.requires_grad_(False)


def prove_kohya_dora(
    path: Path, tensors: Tensors, live: dict[str, LoraLayer], adapter_name: str
) -> FileProof:
    """Compare ΔW and DoRA's magnitudes as the file defines them."""
    differences, components = {}, {name.partition(".")[0] for name in live}
    for name, layer in live.items():
        component, module = name.split(".", 1)
        named = key_names.kohya_name(
            component, key_names.published_path(component, module), components
        )
        up, down, alpha, found_size = (
            tensors[key_names.spell(KOHYA_KEYS, named, part)].double()
            for part in ("up", "down", "alpha", "dora_scale")
        )
        wanted = delta(layer, adapter_name)
        size = layer.lora_magnitude_vector[adapter_name].weight.cpu()[:, None]
        differences[name] = max(
            relative_difference(float(alpha) / len(down) * up @ down, wanted.double()),
            relative_difference(found_size, size.double()),
        )
    worst = max(differences, key=differences.__getitem__)
    return FileProof(path.name, differences[worst], 0.0, worst, "the definition of dora_scale")
