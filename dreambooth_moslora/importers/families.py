"""What other trainers do by the base's family: which noise levels they draw, and which layers they
adapt."""

from typing import Any

from dreambooth_moslora.importers.rows import Translation
from dreambooth_moslora.settings.family_facts import FAMILIES

FAMILIES_BY_NAME = {facts.name: facts for facts in FAMILIES}
LINEAR_UNET_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
)
"""Linear layers of a UNet's transformers."""
CONVOLUTIONS = ("*resnets.*conv*", "*samplers.*.conv")
BLOCK_LAYERS = {
    "sdxl": LINEAR_UNET_LAYERS,
    "sd1": LINEAR_UNET_LAYERS,
    "z_image": ("layers.*",),
    "lumina2": ("layers.*", "noise_refiner.*", "context_refiner.*"),
}
"""Family -> names of all layers in its blocks; for any other they are TRANSFORMER_BLOCKS."""
TRANSFORMER_BLOCKS = ("*transformer_blocks.*",)


def is_flow_family(family: str | None) -> bool:
    return family in FAMILIES_BY_NAME and FAMILIES_BY_NAME[family].style == "flow"


def set_block_layers(translation: Translation, family: str | None) -> None:
    """Adapt all layers in the blocks of a family, unless the layers are named."""
    if family in FAMILIES_BY_NAME:
        layers = list(BLOCK_LAYERS.get(family, TRANSFORMER_BLOCKS))
        translation.add_defaults({"target_modules": layers})


def adapt_convolutions(rank: Any, alpha: Any) -> dict[str, Any]:
    """Return the settings that adapt the convolutions of a UNet too, with a rank of their own."""
    layers = {"target_modules": [*LINEAR_UNET_LAYERS, *CONVOLUTIONS]}
    ranks = {"rank_pattern": [f"{name}={rank}" for name in CONVOLUTIONS]}
    return layers | ranks | {"alpha_pattern": [f"{name}={alpha}" for name in CONVOLUTIONS]}


def set_noise_levels(
    translation: Translation,
    family: str | None,
    source: str,
    scheme: str = "none",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float | None = 1.0,
) -> None:
    """Store how the noise levels of a flow are drawn; nothing for other families.

    scheme: `weighting_scheme`
    mean, std: of the logit of the noise's share, with `logit_normal`
    shift: factor by which levels are shifted towards noise; None for the base's own, which depends
        on the picture's size in some families
    """
    if not is_flow_family(family):
        return
    facts = FAMILIES_BY_NAME[str(family)]
    settings: dict[str, Any] = {"weighting_scheme": scheme}
    if scheme == "logit_normal":
        # Levels begin with pure noise here, so the logit has the other sign.
        settings |= {"logit_mean": 0.0 - mean, "logit_std": std}
    if shift is not None:
        settings["flow_shift"] = shift
    elif facts.has_level_shift:
        settings["shift_timesteps"] = True
    if facts.precondition_outputs:
        settings["precondition_outputs"] = False
    translation.set_values(settings, source)
