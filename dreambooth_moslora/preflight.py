"""What can be known to fail before anything is loaded: the same for `--dry_run` and for a training."""

from pathlib import Path

from dreambooth_moslora.base_files import base_folder, check_vae
from dreambooth_moslora.bf16 import check_bf16
from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.targets import check_layers
from dreambooth_moslora.versions import require_packages
from dreambooth_moslora.weight_headers import tensor_shapes

__all__ = ["preflight"]


def preflight(config: TrainConfig) -> Path | None:
    """Raises UserError; returns the diffusers folder of the base, if it is on this machine."""
    require_packages(config)
    check_bf16(config)
    if config.mixer == "butterfly" and config.rank % 2:
        raise UserError(f"--mixer butterfly needs an even --rank, not {config.rank}.")
    if config.push_to_hub:
        from dreambooth_moslora.hub import check_push

        check_push(config)
    if config.pretrained_vae_model_name_or_path:
        check_vae(config.pretrained_vae_model_name_or_path)
    folder = base_folder(config)
    layers = unet_layers(folder, config.variant) if folder else {}
    if layers:
        check_layers(config.target_modules, layers, config.use_dora)
    return folder


def unet_layers(folder: Path, variant: str | None) -> dict[str, int]:
    """Path of each layer with a weight that is no vector -> its dimensions: 2 of a matrix, 4 of a convolution."""
    shapes = tensor_shapes(folder / "unet", variant)
    return {name.removesuffix(".weight"): len(shape) for name, shape in shapes.items() if len(shape) > 1}
