"""Mixture-of-Subspaces LoRA (MoSLoRA), Wu, Wang, Zhao, Wong, arXiv 2406.11909.

    y = W0·x + s·B·M·A·x        W0 (out, in) frozen,  A (r, in),  M (r, r) the mixer,  B (out, r),  s = alpha/r

Of a convolution W0 and A are kernels (out, in, h, w) and (r, in, h, w), and M and B mix channels, pixel by pixel.
A starts gaussian, B at zero, so the adapter starts as a no-op whatever the mixer. B·M is itself a LoRA "up" matrix:
every adapter folds exactly into a plain LoRA (`fold`), and M = I is LoRA.

The mixer lives inside PEFT's `lora_B[adapter]` (`mixer.MixedUp`), so everything that PEFT does with a LoRA layer it
does with this one: quantised bases, DoRA, merging, several adapters. Two doors lead here: `inject` for a model that is
already there, and `MoSLoraConfig` for `peft.get_peft_model`.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch import Tensor, nn

from dreambooth_moslora.adapters.mixer import MixedUp, MixedUpConv, initial_mixer
from dreambooth_moslora.core.config import MIXERS
from dreambooth_moslora.core.errors import UserError

__all__ = [
    "ATTENTION_PROJECTIONS",
    "FoldedLayer",
    "MoSLoraConfig",
    "adapter_layers",
    "adapter_parameters",
    "disabled",
    "fold",
    "inject",
    "mixer_parameters",
    "set_scale",
]

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # the paper's targets in SDXL
SAVED_TYPE = "MOSLORA"


@dataclass
class MoSLoraConfig(LoraConfig):
    """PEFT's LoraConfig with a mixer. All the other fields, `lora_alpha` too, keep PEFT's names and defaults."""

    init_lora_weights: bool | str = field(
        default="gaussian", metadata=LoraConfig.__dataclass_fields__["init_lora_weights"].metadata
    )
    mixer: str = field(default="orthogonal", metadata={"help": f"How M starts: one of {', '.join(MIXERS)}."})
    train_mixer: bool = field(default=True, metadata={"help": "Learn M, or keep it as it started."})
    mixer_seed: int = field(default=0, metadata={"help": "Seed of the random mixers."})

    def __post_init__(self):
        if self.mixer not in MIXERS:
            raise UserError(f"mixer={self.mixer!r} is unknown; choose one of {', '.join(MIXERS)}")
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            if rank < 1:
                raise UserError(f"a rank is a whole number from 1 on, not {rank}")
        if self.mixer != "none":
            self._check_goes_with_a_mixer()
        super().__post_init__()

    def _check_goes_with_a_mixer(self) -> None:
        """Refuse what PEFT would compute from B·A without its mixer."""
        variants = {f.name for f in fields(self) if f.metadata.get("is_lora_variant")} - {"use_dora"}
        for name in sorted(variants | {"lora_bias"}):
            if getattr(self, name):
                raise UserError(f'{name} cannot be combined with a mixer; leave it out or use mixer="none"')
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UserError(
                f"init_lora_weights={self.init_lora_weights!r} computes B·A from the base weights, which a mixer would "
                'change; use "gaussian" or mixer="none"'
            )
        odd = [r for r in (self.r, *(self.rank_pattern or {}).values()) if r % 2]
        if self.mixer == "butterfly" and odd:
            raise UserError(f"the butterfly mixer [[I, I], [I, I]] needs even ranks, not {odd[0]}")

    def to_dict(self) -> dict[str, object]:
        """What PEFT's `save_pretrained` writes. A PEFT without this package refuses the type; as LORA it would compute
        B·A or nothing, with a warning. Without a mixer it is a plain LoraConfig's."""
        if self.mixer == "none":
            return self.without_mixer().to_dict()
        return super().to_dict() | {"peft_type": SAVED_TYPE}

    def without_mixer(self) -> LoraConfig:
        """The plain LoraConfig that a folded copy of this adapter has."""
        return LoraConfig(**{f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init})


def _check_can_mix(layer: LoraLayer, adapter_name: str, path: str) -> None:
    """Raise UserError with the layer's name unless its lora_B is a plain matrix that PEFT only multiplies by."""
    plain = adapter_name in layer.lora_B and type(layer.lora_B[adapter_name]) in (nn.Linear, nn.Conv2d)
    base = layer.get_base_layer()
    if not plain or isinstance(layer, (MultiheadAttention, ParamWrapper)) or _is_odd_convolution(base):
        raise _cannot_carry(path, base)
    if adapter_name in layer.lora_magnitude_vector:
        _check_no_dora(path, base)


def _check_no_dora(path: str, base: nn.Module) -> None:
    if isinstance(base, nn.modules.conv._ConvNd):
        raise UserError(f"{path} is a convolution, and DoRA is for projections; leave out the one or the other")


def _is_odd_convolution(module: nn.Module) -> bool:
    """Where PEFT's A would be another convolution than the base's, or where M would mix groups."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return not (isinstance(module, nn.Conv2d) and plain)


def _cannot_carry(path: str, module: nn.Module) -> UserError:
    kind = "grouped, dilated or circular Conv2d" if isinstance(module, nn.Conv2d) else type(module).__name__
    return UserError(f"{path} is a {kind}, which cannot carry a mixer; leave it out of target_modules")


def _mix(layer: LoraLayer, adapter_name: str, config: MoSLoraConfig, path: str) -> None:
    """Put a mixer between the A and the B that PEFT has just made for this projection."""
    _check_can_mix(layer, adapter_name, path)
    plain = layer.lora_B[adapter_name].weight
    mixer = initial_mixer(config.mixer, plain.shape[1], config.mixer_seed, path).to(plain.device)
    kind = MixedUpConv if plain.ndim == 4 else MixedUp
    mixed = kind(plain.detach().flatten(1).float(), mixer, config.train_mixer)
    layer.lora_B[adapter_name] = mixed.requires_grad_(plain.requires_grad)
    layer.lora_A[adapter_name].float()  # one dtype, also where PEFT is told to leave the adapter in the base's


def _teach_peft() -> None:
    """Let PEFT's own LoraModel finish each layer of a MoSLoraConfig, and fold before it combines adapters.

    PEFT's registration of custom layer classes is not asked when a second adapter joins a layer that is already
    wrapped, and `add_weighted_adapter` writes into `lora_B.weight`, which a mixer computes: silent errors, both.
    """
    create, combine = LoraModel._create_and_replace, LoraModel.add_weighted_adapter

    @wraps(create)
    def create_and_mix(self, lora_config, adapter_name, target, target_name, parent, current_key, **options):
        create(self, lora_config, adapter_name, target, target_name, parent, current_key, **options)
        if isinstance(lora_config, MoSLoraConfig) and lora_config.mixer != "none":
            _mix(getattr(parent, target_name), adapter_name, lora_config, current_key)

    @wraps(combine)
    def combine_folded(self, *arguments, **options):
        live = dict(self.peft_config)
        self.peft_config.update({n: c.without_mixer() for n, c in live.items() if isinstance(c, MoSLoraConfig)})
        try:
            combine(self, *arguments, **options)
        finally:
            self.peft_config.update(live)

    LoraModel._create_and_replace, LoraModel.add_weighted_adapter = create_and_mix, combine_folded
    PEFT_TYPE_TO_CONFIG_MAPPING[SAVED_TYPE] = MoSLoraConfig  # so that PeftModel.from_pretrained finds the class
    CONFIG_KEYS_TO_CHECK[PeftType.LORA].append("mixer")  # a plain LoRA swapped in for a mixed one would become zero


_teach_peft()


def inject(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> nn.Module:
    """Add an adapter to a model in place, freeze the base, make the adapter the active one. Returns the model.

    Adapter weights are fp32 whatever the base's dtype. Raises UserError when no module matches, when the name is
    taken, or when a target cannot carry a mixer; the model is unchanged then.
    """
    if adapter_name in getattr(model, "peft_config", {}):
        raise UserError(f"The model already has an adapter named {adapter_name!r}; delete it or choose another name")
    _check_targets(model.get_base_model() if isinstance(model, PeftModel) else model, config)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name)
    cast_adapter_dtype(model, adapter_name)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    for layer in adapter_layers(model, adapter_name).values():
        layer.set_adapter(adapter_name)
    return model


def _check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Refuse before anything is changed: nothing matches, or a match cannot carry a mixer."""
    if config.target_modules in (None, "all-linear"):  # PEFT finds these by itself
        return
    targets = {
        path: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for path, module in model.named_modules()
        if ".base_layer" not in path and LoraModel._check_target_module_exists(config, path)
    }
    if not targets:
        raise UserError(f"target_modules={config.target_modules!r} matches no module of {type(model).__name__}")
    for path, module in targets.items():
        if all(part.ndim < 2 for part in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            raise UserError(f"{path} is a {type(module).__name__}, which has no matrix to adapt; leave it out")
        if config.use_dora:
            _check_no_dora(path, module)
    if getattr(config, "mixer", "none") == "none":
        return
    for path, module in targets.items():
        if isinstance(module, (nn.Embedding, nn.MultiheadAttention)) or _is_odd_convolution(module):
            raise _cannot_carry(path, module)


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Module path -> PEFT layer, for each projection that the adapter touches, in the model's order."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {p: m for p, m in base.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A}
    if not layers:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise UserError(f"No adapter named {adapter_name!r} in {type(base).__name__}; it has: {known}")
    return layers


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of every A, B, learnt M and DoRA magnitude, in the model's order. Frozen mixers are not in."""
    found = []
    for path, layer in adapter_layers(model, adapter_name).items():
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            module = getattr(layer, part)
            if adapter_name in module:
                found += [(f"{path}.{part}.{n}", p) for n, p in module[adapter_name].named_parameters()]
    return found


def mixer_parameters(model: nn.Module, adapter_name: str = "default") -> list[tuple[str, nn.Parameter]]:
    """The learnt mixers among `adapter_parameters`. Weight decay would pull M to 0, not to its start: exempt them."""
    return [(name, p) for name, p in adapter_parameters(model, adapter_name) if name.endswith(".lora_B.mixer")]


def set_scale(model: nn.Module, scale: float, adapter_name: str = "default") -> None:
    """Multiply the adapter's own s = alpha/r by `scale` (1 = as trained)."""
    for layer in adapter_layers(model, adapter_name).values():
        layer.set_scale(adapter_name, scale)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone, for the length of a `with` block. Gradient flags stay as they are, unlike PEFT's own switch."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


class FoldedLayer(NamedTuple):
    """A plain LoRA with alpha = rank: ΔW = up·down. fp32, on the CPU."""

    down: Tensor  # A (r, in); (r, in, h, w) of a convolution
    up: Tensor  # s·B·M (out, r); (out, r, 1, 1)
    dora: Tensor | None  # DoRA's magnitude (out,)

    @property
    def delta(self) -> Tensor:
        """ΔW (out, in) or (out, in, h, w), computed in fp64."""
        change = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return change.view(len(self.up), *self.down.shape[1:]).float()


def nominal_scale(layer: LoraLayer, adapter_name: str) -> float:
    """s = alpha/r (alpha/√r for rsLoRA), whatever `set_scale` has made of it for the moment."""
    rank = layer.r[adapter_name]
    return layer.lora_alpha[adapter_name] / (math.sqrt(rank) if layer.use_rslora[adapter_name] else rank)


@torch.no_grad()
def fold_layer(layer: LoraLayer, adapter_name: str) -> FoldedLayer:
    """Fold one projection in fp64."""
    down, lora_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name]
    up = lora_b.up.double() @ lora_b.mixer.double() if isinstance(lora_b, MixedUp) else lora_b.weight.double()
    up = up.view(len(up), -1, *(1,) * (down.ndim - 2))
    dora = layer.lora_magnitude_vector[adapter_name].weight if adapter_name in layer.lora_magnitude_vector else None
    return FoldedLayer(
        down.float().cpu().clone(memory_format=torch.contiguous_format),
        (nominal_scale(layer, adapter_name) * up).float().cpu().contiguous(),
        None if dora is None else dora.float().cpu().clone(),
    )


def fold(model: nn.Module, adapter_name: str = "default") -> dict[str, FoldedLayer]:
    """Module path -> the plain LoRA that equals this adapter at scale 1."""
    return {path: fold_layer(layer, adapter_name) for path, layer in adapter_layers(model, adapter_name).items()}
