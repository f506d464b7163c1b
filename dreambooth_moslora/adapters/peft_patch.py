"""What this package changes in PEFT, and what it refuses because PEFT would compute something else.

`patch_peft` wraps two methods of PEFT's LoraModel. It is called when the first config with a mixer is made;
programs that use only plain LoRA keep PEFT's own methods. The patch stays for the life of the process:
`PeftModel.add_adapter` and `add_weighted_adapter` can be called at any later time, and PEFT has no hook there.
"""

from dataclasses import fields
from functools import cache, wraps

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch import nn

from dreambooth_moslora.adapters.mixer import MixerConv2d, MixerLinear, initial_mixer
from dreambooth_moslora.core.config.training_settings import MIXERS, ZERO
from dreambooth_moslora.core.errors import UserError

__all__ = ["check_settings", "check_targets", "has_mixer", "patch_peft", "register"]

create, combine = LoraModel._create_and_replace, LoraModel.add_weighted_adapter


@cache
def patch_peft() -> None:
    """Make PEFT's LoraModel put the config's mixer into each layer, and fold adapters before it combines them.

    PEFT's registration of custom layer classes does not suffice: it is ignored when a second adapter joins a
    wrapped layer, and `add_weighted_adapter` writes to `lora_B.weight`, which a mixer computes. Both errors
    would be silent.
    """
    LoraModel._create_and_replace, LoraModel.add_weighted_adapter = create_and_mix, combine_folded


def register(saved_type: str, config_class: type[LoraConfig]) -> None:
    """Let `PeftModel.from_pretrained` find a saved config's class, and `hotswap_adapter` compare mixers.

    Otherwise a plain LoRA swapped in for one with a mixer would become zero.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[saved_type] = config_class
    CONFIG_KEYS_TO_CHECK[PeftType.LORA].append("mixer")


def has_mixer(config: LoraConfig) -> bool:
    return getattr(config, "mixer", "none") != "none"


@wraps(create)
def create_and_mix(self, lora_config, adapter_name, target, target_name, parent, current_key, **options):
    create(self, lora_config, adapter_name, target, target_name, parent, current_key, **options)
    if has_mixer(lora_config):
        add_mixer(getattr(parent, target_name), adapter_name, lora_config, current_key)


@wraps(combine)
def combine_folded(self, *arguments, **options):
    live = dict(self.peft_config)
    self.peft_config.update({name: config.without_mixer() for name, config in live.items() if has_mixer(config)})
    try:
        combine(self, *arguments, **options)
    finally:
        self.peft_config.update(live)


def add_mixer(layer: LoraLayer, adapter_name: str, config: LoraConfig, path: str) -> None:
    """Put a mixer between the A and the B that PEFT has just made for the layer at `path`.

    A, M and B become fp32, even if PEFT is told to use the base's dtype. Raises UserError for a layer that
    cannot carry a mixer.
    """
    check_layer(layer, adapter_name, path)
    plain = layer.lora_B[adapter_name].weight
    mixer = initial_mixer(config.mixer, plain.shape[1], config.mixer_seed, path).to(plain.device)
    mixer_class = MixerConv2d if plain.ndim == 4 else MixerLinear
    mixed = mixer_class(plain.detach().flatten(1).float(), mixer, config.train_mixer)
    layer.lora_B[adapter_name] = mixed.requires_grad_(plain.requires_grad)
    layer.lora_A[adapter_name].float()


def check_settings(config: LoraConfig) -> None:
    """Raises UserError for a rank below 1, an unknown mixer, or a setting that excludes a mixer."""
    ranks = (config.r, *(config.rank_pattern or {}).values())
    if config.mixer not in (*MIXERS, ZERO):
        raise UserError(f"mixer={config.mixer!r} is unknown; choose one of {', '.join(MIXERS)}")
    for rank in ranks:
        if rank < 1:
            raise UserError(f"a rank is a whole number from 1 on, not {rank}")
        if config.mixer == "butterfly" and rank % 2:
            raise UserError(f"the butterfly mixer [[I, I], [I, I]] needs even ranks, not {rank}")
    if has_mixer(config):
        check_variants(config)


def check_variants(config: LoraConfig) -> None:
    """Raises UserError for variants of LoRA that PEFT would compute from B·A, without the mixer."""
    variants = {field.name for field in fields(config) if field.metadata.get("is_lora_variant")} - {"use_dora"}
    for name in sorted(variants | {"lora_bias"}):
        if getattr(config, name):
            raise UserError(f'{name} cannot be combined with a mixer; leave it out or use mixer="none"')
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise UserError(
            f"init_lora_weights={config.init_lora_weights!r} computes B·A from the base weights, which a mixer would "
            'change; use "gaussian" or mixer="none"'
        )


def check_targets(targets: dict[str, nn.Module], config: LoraConfig, model_name: str) -> None:
    """`targets`: module path -> base layer. Raises UserError if empty, and for the first unsuitable one."""
    if not targets:
        raise UserError(f"target_modules={config.target_modules!r} matches no module of {model_name}")
    for path, module in targets.items():
        if all(part.ndim < 2 for part in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            raise UserError(f"{path} is a {type(module).__name__}, which has no matrix to adapt; leave it out")
        if config.use_dora:
            check_dora(path, module)
    if not has_mixer(config):
        return
    for path, module in targets.items():
        if isinstance(module, (nn.Embedding, nn.MultiheadAttention)) or is_odd_convolution(module):
            raise cannot_carry(path, module)


def check_layer(layer: LoraLayer, adapter_name: str, path: str) -> None:
    """Raises UserError unless PEFT only multiplies by the layer's lora_B, a plain matrix."""
    is_plain = adapter_name in layer.lora_B and type(layer.lora_B[adapter_name]) in (nn.Linear, nn.Conv2d)
    base = layer.get_base_layer()
    if not is_plain or isinstance(layer, (MultiheadAttention, ParamWrapper)) or is_odd_convolution(base):
        raise cannot_carry(path, base)
    if adapter_name in layer.lora_magnitude_vector:
        check_dora(path, base)


def check_dora(path: str, base: nn.Module) -> None:
    """Raises UserError for DoRA on a convolution."""
    if isinstance(base, nn.modules.conv._ConvNd):
        raise UserError(f"{path} is a convolution, and DoRA is for projections; leave out the one or the other")


def is_odd_convolution(module: nn.Module) -> bool:
    """Whether PEFT's A would differ from the base's kind of convolution, or M would mix groups."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    is_plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return not (isinstance(module, nn.Conv2d) and is_plain)


def cannot_carry(path: str, module: nn.Module) -> UserError:
    kind = "grouped, dilated or circular Conv2d" if isinstance(module, nn.Conv2d) else type(module).__name__
    return UserError(f"{path} is a {kind}, which cannot carry a mixer; leave it out of target_modules")
