"""MoSLoRA adapters on a model, as PEFT layers: add, list, disable and fold them.

The mixer is inside PEFT's `lora_B[adapter]`, so all that PEFT does with a LoRA layer works with it:
quantised bases, DoRA, merging, several adapters. `inject` adds an adapter to a model in place;
`MoSLoraConfig` works with `peft.get_peft_model` too. The first config with a mixer wraps a method
of PEFT's LoraModel for the life of the process: `add_adapter` can be called at any later time, and
PEFT has no hook there.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import cache, wraps

from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import nn

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.method import mixer
from dreambooth_moslora.settings.setting_rows import MIXERS


def get_unwrapped_model(model: nn.Module) -> nn.Module:
    """Return the model inside a `PeftModel`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def get_base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return module path -> module, without PEFT's wrappers and without the model itself; a shared
    module under its first path."""
    paths: dict[nn.Module, str] = {}
    for path, module in _walk(get_unwrapped_model(model), ""):
        paths.setdefault(module, path)
    return {path: module for module, path in paths.items()}


def _walk(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in parent.named_children():
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        yield f"{prefix}{name}", module
        yield from _walk(module, f"{prefix}{name}.")


def get_matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the base's modules whose weight has at least 2 dimensions: projections, convolutions
    and embeddings."""
    return {
        path: module
        for path, module in get_base_modules(model).items()
        if getattr(getattr(module, "weight", None), "ndim", 0) > 1
    }


def build_value_pattern(values: Mapping[str, float], common: float) -> dict[str, float]:
    """Build PEFT's `rank_pattern` or `alpha_pattern` for the paths whose value is not the common
    one. It has one regular expression for each value, as PEFT tries each on every module."""
    paths: dict[float, list[str]] = {}
    for path, value in values.items():
        if value != common:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^(?:{'|'.join(names)})": value for value, names in paths.items()}


def get_weight_size(module: nn.Module | None) -> tuple[int, ...]:
    """Return (out, in) of a projection, also if quantised, (out, in, h, w) of a convolution, () of
    anything else."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels, *module.kernel_size)
    return (module.out_features, module.in_features) if hasattr(module, "out_features") else ()


create_and_replace = LoraModel._create_and_replace


@cache
def patch_peft() -> None:
    """Patch PEFT's LoraModel to put the config's mixer into each layer.

    PEFT has no hook for this. It ignores custom layer classes for a second adapter. A `LoraVariant`
    would need an entry in the table of every layer class, and its own forward, merge and unmerge
    for each of them; a layer with one cannot have DoRA too.
    """
    LoraModel._create_and_replace = create_with_mixer


def has_mixer(config: LoraConfig) -> bool:
    """Return whether the config's layers have an M; False for a plain LoraConfig of PEFT."""
    return getattr(config, "mixer", "none") != "none"


@wraps(create_and_replace)
def create_with_mixer(
    self, lora_config, adapter_name, target, target_name, parent, current_key, **options
):
    """Create PEFT's LoRA layer, with an fp32 mixer between A and B. Raises UserError for a layer
    that cannot carry a mixer."""
    # PEFT creates its layer with A and B, as for a plain LoRA.
    create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **options
    )
    if not has_mixer(lora_config):
        return

    # Refuse a layer whose B is not a plain matrix or kernel: M cannot be multiplied by it.
    layer = getattr(parent, target_name)
    matrices = (nn.Linear, nn.Conv2d)
    is_plain = adapter_name in layer.lora_B and type(layer.lora_B[adapter_name]) in matrices
    if not is_plain or is_odd_convolution(layer.get_base_layer()):
        kind = type(layer.get_base_layer()).__name__
        raise UserError(
            f"{current_key} is a {kind} that cannot carry a mixer; leave it out of target_modules"
        )

    # Replace B by B·M₀. B and M learn if PEFT's B would.
    plain = layer.lora_B[adapter_name].weight
    start = mixer.build_initial_mixer(
        kind=lora_config.mixer,
        rank=plain.shape[1],
        seed=lora_config.mixer_seed,
        path=current_key,
    )
    mixer_class = mixer.MixerConv2d if plain.ndim == 4 else mixer.MixerLinear
    mixed = mixer_class(
        up=plain.detach().flatten(1).float(),
        mixer=start.to(plain.device),
        train_mixer=lora_config.train_mixer,
    )
    layer.lora_B[adapter_name] = mixed.requires_grad_(plain.requires_grad)
    layer.lora_A[adapter_name].float()


def is_odd_convolution(module: nn.Module) -> bool:
    """Return whether PEFT's A would differ from the base's kind of convolution, or M would mix
    groups."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    is_plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return not (isinstance(module, nn.Conv2d) and is_plain)


def check_variants(config: LoraConfig) -> None:
    """Raise UserError for a variant of LoRA that PEFT would compute from B·A, without the mixer.
    DoRA alone reads `lora_B.weight`, which contains it."""
    excluded = ["lora_bias"]
    for variant in fields(config):
        if variant.metadata.get("is_lora_variant") and variant.name != "use_dora":
            excluded.append(variant.name)
    conflicts = [name for name in excluded if getattr(config, name)]
    if config.init_lora_weights not in (True, False, "gaussian"):
        conflicts.append(f"init_lora_weights={config.init_lora_weights!r}")
    if conflicts:
        raise UserError(f'{conflicts[0]} excludes a mixer; leave it out or use mixer="none"')


@dataclass
class MoSLoraConfig(LoraConfig):
    """PEFT's LoraConfig with three fields for the mixer. Raises UserError for options that a mixer
    excludes."""

    init_lora_weights: bool | str = field(
        default="gaussian", metadata=LoraConfig.__dataclass_fields__["init_lora_weights"].metadata
    )
    mixer: str = field(
        default="orthogonal", metadata={"help": f"How M starts: one of {', '.join(MIXERS)}."}
    )
    train_mixer: bool = field(default=True, metadata={"help": "Learn M, or keep it as it started."})
    mixer_seed: int = field(default=0, metadata={"help": "Seed of the random mixers."})

    def __post_init__(self):
        super().__post_init__()
        if has_mixer(self):
            check_variants(self)
            patch_peft()


def build_exact_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    rank: int,
    alpha: float,
    **settings: object,
) -> MoSLoraConfig:
    """Build a config for exactly the layers of `ranks`, each with its rank and alpha.

    ranks, alphas: by module path
    rank, alpha: the most frequent ones
    settings: further fields of the config
    """
    return MoSLoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=build_value_pattern(ranks, rank),
        alpha_pattern=build_value_pattern(alphas, alpha),
        target_modules="|".join(map(re.escape, ranks)),
        **settings,
    )


def inject(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> nn.Module:
    """Add an adapter in fp32 to a model in place, freeze the base, and return the model. Raises
    UserError if a target cannot carry a mixer."""
    # PEFT replaces the layers in place. It warns of every second adapter.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name)
    cast_adapter_dtype(model, adapter_name)

    # The methods of diffusers and transformers for adapters require this mark.
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    for layer in get_adapter_layers(model, adapter_name).values():
        layer.set_adapter(adapter_name)
    return model


def get_adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Return module path -> PEFT layer of each layer with this adapter, in the model's order.
    Raises UserError if there is none."""
    base = get_unwrapped_model(model)
    layers = {}
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            layers[path] = module
    if not layers:
        names = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise UserError(
            f"No adapter named {adapter_name!r} in {type(base).__name__}; it has: {names}"
        )
    return layers


def list_adapter_parameters(
    model: nn.Module, adapter_name: str = "default"
) -> list[tuple[str, nn.Parameter]]:
    """List (name, parameter) of every A, B, learnt M and DoRA magnitude, in the model's order."""
    parameters = []
    for path, layer in get_adapter_layers(model, adapter_name).items():
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            modules = getattr(layer, part)
            if adapter_name not in modules:
                continue
            for name, parameter in modules[adapter_name].named_parameters():
                parameters.append((f"{path}.{part}.{name}", parameter))
    return parameters


def list_mixer_parameters(
    model: nn.Module, adapter_name: str = "default"
) -> list[tuple[str, nn.Parameter]]:
    """List the learnt mixers among `list_adapter_parameters`. Exempt them from weight decay, which
    would pull M to 0, not to its start."""
    parameters = list_adapter_parameters(model, adapter_name)
    return [(name, parameter) for name, parameter in parameters if name.endswith(".lora_B.mixer")]


def list_lora_layers(model: nn.Module) -> list[LoraLayer]:
    """List PEFT's layers, of any adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def disable_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Disable all adapters within the block, without changing gradient flags as PEFT's method
    does."""
    return disable_layers(list_lora_layers(model))


@contextmanager
def disable_layers(layers: list[LoraLayer]) -> Iterator[None]:
    """Disable the adapters of these layers within the block. A caller that lists the layers once
    saves a walk over thousands of modules."""
    flags = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer._disable_adapters = flag


def get_matrices(layer: LoraLayer, adapter_name: str) -> mixer.MixedLowRank:
    """Return the live A, M, B and magnitude of one layer, not copied. The scale is that of
    training, which PEFT's `set_scale` does not change."""
    # A plain LoRA of PEFT has no mixer, and a kernel as B of a convolution.
    lora_b = layer.lora_B[adapter_name]
    if isinstance(lora_b, mixer.MixerLinear):
        matrix, up = lora_b.mixer, lora_b.up
    else:
        matrix, up = None, lora_b.weight.flatten(1)

    # PEFT's `scaling` may have been changed; alpha and rank are those of training.
    scale = mixer.compute_scale(
        layer.lora_alpha[adapter_name], layer.r[adapter_name], layer.use_rslora[adapter_name]
    )
    magnitudes = layer.lora_magnitude_vector
    magnitude = magnitudes[adapter_name].weight if adapter_name in magnitudes else None
    return mixer.MixedLowRank(
        down=layer.lora_A[adapter_name].weight,
        mixer=matrix,
        up=up,
        scale=scale,
        magnitude=magnitude,
    )


def fold(model: nn.Module, adapter_name: str = "default") -> dict[str, mixer.LowRank]:
    """Return module path -> the plain LoRA (fp32, CPU) that equals this adapter at scale 1. Raises
    UserError if the model has no such adapter."""
    return {
        path: get_matrices(layer, adapter_name).fold()
        for path, layer in get_adapter_layers(model, adapter_name).items()
    }
