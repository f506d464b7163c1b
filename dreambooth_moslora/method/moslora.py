"""MoSLoRA adapters on a model, as PEFT layers: add one, list its layers, scale it, switch it off,
fold it.

The mixer is inside PEFT's `lora_B[adapter]`, so whatever PEFT does with a LoRA layer also works
here: quantised bases, DoRA, merging, several adapters. `inject` adds an adapter to a model in
place, `MoSLoraConfig` is also for `peft.get_peft_model`. The first config with a mixer wraps a
method of PEFT's LoraModel, for the life of the process: `add_adapter` can be called at any later
time, and PEFT has no hook there.
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
from dreambooth_moslora.settings.train_config import MIXERS


def get_unwrapped_model(model: nn.Module) -> nn.Module:
    """The model that `peft.get_peft_model` was given."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def get_base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> module, as without PEFT's wrappers; a shared one under its first path, without
    the model."""
    modules, seen = {}, set()
    for path, module in _walk(get_unwrapped_model(model), ""):
        if module not in seen:
            seen.add(module)
            modules[path] = module
    return modules


def _walk(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in parent.named_children():
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        yield f"{prefix}{name}", module
        yield from _walk(module, f"{prefix}{name}.")


def get_matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The `get_base_modules` whose weight has at least 2 dimensions: projections, convolutions and
    embeddings."""
    modules = get_base_modules(model).items()
    found = {}
    for path, module in modules:
        weight = getattr(module, "weight", None)
        if getattr(weight, "ndim", 0) > 1:
            found[path] = module
    return found


def build_value_pattern(values: Mapping[str, float], common: float) -> dict[str, float]:
    """PEFT's `rank_pattern` or `alpha_pattern` for the paths with another value than the common
    one. It has one regular expression a value, as PEFT tries each on every module."""
    paths: dict[float, list[str]] = {}
    for path, value in values.items():
        if value != common:
            paths.setdefault(value, []).append(re.escape(path))
    return {f"^(?:{'|'.join(names)})": value for value, names in paths.items()}


def get_weight_size(module: nn.Module | None) -> tuple[int, ...]:
    """(out, in) of a projection, also if quantised, (out, in, h, w) of a convolution, () of
    anything else."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels, *module.kernel_size)
    return (module.out_features, module.in_features) if hasattr(module, "out_features") else ()


# PEFT's own method, which the patch calls.
create_and_replace = LoraModel._create_and_replace


@cache
def patch_peft() -> None:
    """Make PEFT's LoraModel put the config's mixer into each layer. PEFT ignores its own
    registration of layer classes for a second adapter."""
    LoraModel._create_and_replace = create_with_mixer


def has_mixer(config: LoraConfig) -> bool:
    """Whether its layers have an M; also for a plain LoraConfig of PEFT."""
    return getattr(config, "mixer", "none") != "none"


@wraps(create_and_replace)
def create_with_mixer(
    self, lora_config, adapter_name, target, target_name, parent, current_key, **options
):
    """Also put an fp32 mixer between PEFT's A and B. Raises UserError for a layer into which none
    can be put."""
    # PEFT makes its layer with A and B, as for a plain LoRA.
    create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **options
    )
    if not has_mixer(lora_config):
        return

    # Refuse the layers whose B is no matrix that is multiplied by: M would have no place there.
    layer = getattr(parent, target_name)
    matrices = (nn.Linear, nn.Conv2d)
    is_plain = adapter_name in layer.lora_B and type(layer.lora_B[adapter_name]) in matrices
    if not is_plain or is_odd_convolution(layer.get_base_layer()):
        kind = type(layer.get_base_layer()).__name__
        raise UserError(
            f"{current_key} is a {kind} that cannot carry a mixer; leave it out of target_modules"
        )

    # Draw M₀, and put B·M in the place of B. B learns if PEFT's B would, and M with it.
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
    """Whether PEFT's A would differ from the base's kind of convolution, or M would mix groups."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    is_plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return not (isinstance(module, nn.Conv2d) and is_plain)


def check_variants(config: LoraConfig) -> None:
    """Raises UserError for a variant of LoRA that PEFT would compute from B·A, without the mixer.
    DoRA alone reads `lora_B.weight`, which has it."""
    excluded = ["lora_bias"]
    for one in fields(config):
        if one.metadata.get("is_lora_variant") and one.name != "use_dora":
            excluded.append(one.name)
    given = [name for name in excluded if getattr(config, name)]
    if config.init_lora_weights not in (True, False, "gaussian"):
        given.append(f"init_lora_weights={config.init_lora_weights!r}")
    if given:
        raise UserError(f'{given[0]} excludes a mixer; leave it out or use mixer="none"')


INIT_WEIGHTS_FIELD = LoraConfig.__dataclass_fields__["init_lora_weights"]
"""PEFT's field, whose help text is kept with another default."""


@dataclass
class MoSLoraConfig(LoraConfig):
    """PEFT's LoraConfig with a mixer; its other fields are PEFT's. Raises UserError for what a
    mixer excludes."""

    init_lora_weights: bool | str = field(default="gaussian", metadata=INIT_WEIGHTS_FIELD.metadata)
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
    """A config for exactly the given layers, each with its rank and alpha.

    ranks, alphas: by module path
    rank, alpha: the usual ones, which most layers have
    settings: other fields of the config
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
    """Add an adapter, in fp32, to a model in place, freeze the base, and return the model. Raises
    UserError where a target cannot carry a mixer."""
    # PEFT replaces the layers in place. It warns of any second adapter.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name)
    cast_adapter_dtype(model, adapter_name)

    # A mark of diffusers and transformers: their own methods for adapters ask for it.
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    for layer in get_adapter_layers(model, adapter_name).values():
        layer.set_adapter(adapter_name)
    return model


def get_adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Module path -> PEFT layer, for each layer with this adapter, in the model's order. Raises
    UserError where there is none."""
    base = get_unwrapped_model(model)
    layers = {}
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            layers[path] = module
    if not layers:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise UserError(
            f"No adapter named {adapter_name!r} in {type(base).__name__}; it has: {known}"
        )
    return layers


def list_adapter_parameters(
    model: nn.Module, adapter_name: str = "default"
) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of every learnt A, B, M and DoRA magnitude, in the model's order."""
    found = []
    for path, layer in get_adapter_layers(model, adapter_name).items():
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            modules = getattr(layer, part)
            if adapter_name not in modules:
                continue
            for name, parameter in modules[adapter_name].named_parameters():
                found.append((f"{path}.{part}.{name}", parameter))
    return found


def list_mixer_parameters(
    model: nn.Module, adapter_name: str = "default"
) -> list[tuple[str, nn.Parameter]]:
    """The learnt mixers among `list_adapter_parameters`. Weight decay would pull M to 0, not to its
    start: exempt them."""
    named = list_adapter_parameters(model, adapter_name)
    return [(name, parameter) for name, parameter in named if name.endswith(".lora_B.mixer")]


def list_lora_layers(model: nn.Module) -> list[LoraLayer]:
    """PEFT's layers, of any adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def disable_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Switch all adapters off for the block, without changing gradient flags as PEFT's own switch
    does."""
    return disable_layers(list_lora_layers(model))


@contextmanager
def disable_layers(layers: list[LoraLayer]) -> Iterator[None]:
    """`disabled` for given layers: finding them means walking over thousands of modules."""
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def get_matrices(layer: LoraLayer, adapter_name: str) -> mixer.MixedLowRank:
    """The live A, M, B and magnitude of one layer, not copied. Its scale is the s of training,
    which PEFT's `set_scale` does not change."""
    # Without a mixer, B is PEFT's own.
    lora_b = layer.lora_B[adapter_name]
    if isinstance(lora_b, mixer.MixerLinear):
        mix, up = lora_b.mixer, lora_b.up
    else:
        mix, up = None, lora_b.weight.flatten(1)

    scale = mixer.compute_scale(
        layer.lora_alpha[adapter_name], layer.r[adapter_name], layer.use_rslora[adapter_name]
    )
    magnitudes = layer.lora_magnitude_vector
    magnitude = magnitudes[adapter_name].weight if adapter_name in magnitudes else None
    return mixer.MixedLowRank(
        down=layer.lora_A[adapter_name].weight,
        mixer=mix,
        up=up,
        scale=scale,
        magnitude=magnitude,
    )


def fold(model: nn.Module, adapter_name: str = "default") -> dict[str, mixer.LowRank]:
    """Module path -> the plain LoRA (fp32, CPU) that equals this adapter at scale 1. Raises
    UserError."""
    layers = get_adapter_layers(model, adapter_name)
    return {path: get_matrices(layer, adapter_name).fold() for path, layer in layers.items()}
