"""What a command line of `train` means."""

from collections.abc import Sequence

from dreambooth_moslora.cli.command_train import parse_training
from dreambooth_moslora.settings.train_config import TrainConfig


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """The settings of the run. Raises UserError."""
    return TrainConfig.from_dict(parse_training(argv).all_settings)
