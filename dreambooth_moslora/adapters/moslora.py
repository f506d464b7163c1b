"""MoSLoRA adapters on a model: add one, list its layers and parameters, scale it, switch it off, fold it.

`mixer` holds the method. The mixer is inside PEFT's `lora_B[adapter]`, so whatever PEFT does with a LoRA layer
also works with this one: quantised bases, DoRA, merging, several adapters. There are two ways to add an
adapter: `inject` for a model in place, and `MoSLoraConfig` for `peft.get_peft_model`.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields

from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

from dreambooth_moslora.adapters.layers import target_layers, without_wrapper
from dreambooth_moslora.adapters.low_rank import LowRank
from dreambooth_moslora.adapters.mixer import MixedLowRank, MixerLinear, nominal_scale
from dreambooth_moslora.adapters.peft_patch import check_settings, check_targets, has_mixer, patch_peft, register
from dreambooth_moslora.core.config.training_settings import MIXERS, ZERO
from dreambooth_moslora.core.errors import UserError

__all__ = [
    "ATTENTION_PROJECTIONS",
    "MoSLoraConfig",
    "adapter_layers",
    "adapter_parameters",
    "disabled",
    "fold",
    "fold_layer",
    "inject",
    "lora_layers",
    "matrices_of",
    "mixer_parameters",
    "set_scale",
    "switched_off",
]

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # the paper's targets in SDXL
SAVED_TYPE = "MOSLORA"


@dataclass
class MoSLoraConfig(LoraConfig):
    """PEFT's LoraConfig with a mixer. All other fields, `lora_alpha` too, keep PEFT's names and defaults.

    Raises UserError for an unknown mixer, a rank below 1, and settings that cannot be combined with a mixer.
    """

    init_lora_weights: bool | str = field(
        default="gaussian", metadata=LoraConfig.__dataclass_fields__["init_lora_weights"].metadata
    )
    mixer: str = field(default="orthogonal", metadata={"help": f"How M starts: one of {', '.join(MIXERS)}."})
    train_mixer: bool = field(default=True, metadata={"help": "Learn M, or keep it as it started."})
    mixer_seed: int = field(default=0, metadata={"help": "Seed of the random mixers."})

    def __post_init__(self):
        check_settings(self)
        super().__post_init__()
        if has_mixer(self):
            patch_peft()

    def __setstate__(self, state: dict[str, object]) -> None:
        """A config unpickled from another process needs the patch too."""
        self.__dict__.update(state)
        if has_mixer(self):
            patch_peft()

    def to_dict(self) -> dict[str, object]:
        """The content of PEFT's `save_pretrained`; without a mixer it is a plain LoraConfig's.

        PEFT without this package refuses the type MOSLORA. As LORA it would load and compute a wrong ΔW.
        """
        if self.mixer == "none":
            return self.without_mixer().to_dict()
        return super().to_dict() | {"peft_type": SAVED_TYPE}

    def without_mixer(self) -> LoraConfig:
        """The plain LoraConfig of a folded copy of this adapter."""
        return LoraConfig(**{f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init})


register(SAVED_TYPE, MoSLoraConfig)


def inject(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> nn.Module:
    """Add an adapter to a model in place, freeze the base, activate the adapter. Returns the model.

    Adapter weights are fp32 whatever the base's dtype. Raises UserError when no module matches, when the name
    is taken, or when a target cannot carry a mixer; the model is unchanged then.
    """
    if adapter_name in getattr(model, "peft_config", {}):
        raise UserError(f"The model already has an adapter named {adapter_name!r}; delete it or choose another name")
    if config.target_modules not in (None, "all-linear"):  # PEFT finds their layers itself
        check_targets(target_layers(model, config), config, type(without_wrapper(model)).__name__)
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


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Module path -> PEFT layer, for each projection with this adapter, in the model's order. Raises UserError."""
    base = without_wrapper(model)
    layers = {p: m for p, m in base.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A}
    if not layers:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise UserError(f"No adapter named {adapter_name!r} in {type(base).__name__}; it has: {known}")
    return layers


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of every A, B, learnt M and DoRA magnitude, in the model's order.

    Frozen mixers, and A and B of a frozen basis, are left out.
    """
    found, is_basis = [], getattr(model.peft_config.get(adapter_name), "mixer", None) == ZERO
    for path, layer in adapter_layers(model, adapter_name).items():
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            module = getattr(layer, part)
            if adapter_name in module:
                own = module[adapter_name].named_parameters()
                found += [(f"{path}.{part}.{n}", p) for n, p in own if n == "mixer" or not is_basis]
    return found


def mixer_parameters(model: nn.Module, adapter_name: str = "default") -> list[tuple[str, nn.Parameter]]:
    """The learnt mixers among `adapter_parameters`.

    Weight decay would pull M to 0, not to its start: exempt them.
    """
    return [(name, p) for name, p in adapter_parameters(model, adapter_name) if name.endswith(".lora_B.mixer")]


def set_scale(model: nn.Module, scale: float, adapter_name: str = "default") -> None:
    """Multiply the adapter's own s = alpha/r by `scale` (1 = as trained)."""
    for layer in adapter_layers(model, adapter_name).values():
        layer.set_scale(adapter_name, scale)


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Every layer with adapters of any name."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Switch all adapters off for the length of the block.

    Gradient flags do not change, unlike with PEFT's own switch.
    """
    return switched_off(lora_layers(model))


@contextmanager
def switched_off(layers: list[LoraLayer]) -> Iterator[None]:
    """`disabled` for given layers: finding them means walking over thousands of modules."""
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def matrices_of(layer: LoraLayer, adapter_name: str) -> MixedLowRank:
    """The live A, M, B and magnitude of one layer, not copied, and the s of training, not that of `set_scale`."""
    lora_b, magnitudes = layer.lora_B[adapter_name], layer.lora_magnitude_vector
    is_mixed = isinstance(lora_b, MixerLinear)
    return MixedLowRank(
        down=layer.lora_A[adapter_name].weight,
        mixer=lora_b.mixer if is_mixed else None,
        up=lora_b.up if is_mixed else lora_b.weight.flatten(1),
        scale=nominal_scale(layer.lora_alpha[adapter_name], layer.r[adapter_name], layer.use_rslora[adapter_name]),
        magnitude=magnitudes[adapter_name].weight if adapter_name in magnitudes else None,
    )


def fold_layer(layer: LoraLayer, adapter_name: str) -> LowRank:
    """The plain LoRA that equals this layer's adapter at scale 1; fp32, on the CPU."""
    return matrices_of(layer, adapter_name).fold()


def fold(model: nn.Module, adapter_name: str = "default") -> dict[str, LowRank]:
    """Module path -> the plain LoRA that equals this adapter at scale 1.

    Raises UserError for an unknown adapter.
    """
    return {path: fold_layer(layer, adapter_name) for path, layer in adapter_layers(model, adapter_name).items()}
