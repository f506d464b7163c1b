"""What can be known to fail before anything is loaded: the same for `--dry_run` and for a training."""

import os
from pathlib import Path

from dreambooth_moslora.base_files import base_folder
from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.targets import check_targets
from dreambooth_moslora.versions import require_tracker
from dreambooth_moslora.weight_headers import tensor_shapes

__all__ = ["nearest_existing", "preflight"]


def preflight(config: TrainConfig) -> Path | None:
    """Raises UserError; returns the diffusers folder of the base, if it is on this machine."""
    require_tracker(config.report_to)
    if config.report_to in ("tensorboard", "all"):
        check_logging_dir(config)
    if config.push_to_hub:
        from dreambooth_moslora.hub import check_push

        check_push(config)
    folder = base_folder(config)
    layers = [name.removesuffix(".weight") for name in unet_matrices(folder, config.variant)] if folder else []
    if layers:
        check_targets(config.target_modules, layers)
    return folder


def check_logging_dir(config: TrainConfig) -> None:
    found = nearest_existing(Path(config.output_dir, config.logging_dir))
    if not found.is_dir():
        raise UserError(f"--logging_dir {config.logging_dir}: {found} is a file, not a folder.")


def nearest_existing(path: Path) -> Path:
    """The path itself, or the folder that is nearest above it."""
    path = Path(os.path.abspath(path))
    return next(folder for folder in (path, *path.parents) if folder.exists())


def unet_matrices(folder: Path, variant: str | None) -> list[str]:
    return [name for name, shape in tensor_shapes(folder / "unet", variant).items() if len(shape) > 1]
