"""Recognize whose configuration file it is by its shape, and translate it."""

from pathlib import Path
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.ai_toolkit import AI_TOOLKIT
from dreambooth_moslora.importers.kohya import KOHYA
from dreambooth_moslora.importers.onetrainer import ONE_TRAINER
from dreambooth_moslora.importers.reading import YAML_SUFFIXES, read_file
from dreambooth_moslora.importers.rows import Translation
from dreambooth_moslora.importers.simpletuner import SIMPLE_TUNER
from dreambooth_moslora.settings import config_files

TRAINERS = (AI_TOOLKIT, ONE_TRAINER, SIMPLE_TUNER, KOHYA)
"""The first that matches a file counts."""


def load_config(path: Path) -> tuple[dict[str, Any], Translation | None]:
    """Return the settings of a configuration file, and their translation where the file is another
    trainer's. Raises UserError."""
    content = read_file(path)
    for trainer in TRAINERS:
        if trainer.matches(content):
            translation = trainer.translate_config(content)
            return translation.settings, translation
    if path.suffix.lower() in YAML_SUFFIXES:
        raise UserError(f"--config {path}: it is no configuration of a trainer that is known here.")
    return config_files.flatten_tables(content, path), None
