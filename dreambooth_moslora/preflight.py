"""What can be known to fail before anything is loaded: the same for `--dry_run` and for a training."""

from pathlib import Path

from dreambooth_moslora.base_files import base_folder
from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.targets import check_targets
from dreambooth_moslora.versions import require_tracker
from dreambooth_moslora.weight_headers import tensor_shapes

__all__ = ["preflight"]


def preflight(config: TrainConfig) -> Path | None:
    """Raises UserError; returns the diffusers folder of the base, if it is on this machine."""
    require_tracker(config.report_to)
    if config.push_to_hub:
        from dreambooth_moslora.hub import check_push

        check_push(config)
    folder = base_folder(config)
    layers = [name.removesuffix(".weight") for name in unet_matrices(folder, config.variant)] if folder else []
    if layers:
        check_targets(config.target_modules, layers)
    return folder


def unet_matrices(folder: Path, variant: str | None) -> list[str]:
    return [name for name, shape in tensor_shapes(folder / "unet", variant).items() if len(shape) > 1]
