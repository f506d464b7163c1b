"""Recognize whose configuration file it is by its shape, and translate it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers import ai_toolkit, kohya, onetrainer, simpletuner
from dreambooth_moslora.importers.reading import YAML_SUFFIXES, read_file
from dreambooth_moslora.importers.rows import Translation
from dreambooth_moslora.settings import config_files


def load_config(path: Path) -> tuple[dict[str, Any], Translation | None]:
    """Return the settings of a configuration file, and their translation where the file is another
    trainer's. Raises UserError."""
    is_yaml = path.suffix.lower() in YAML_SUFFIXES
    content = read_file(path) if is_yaml else config_files.read_tables(path)
    importer = find_importer(content)
    if importer:
        translation = importer(content)
        return translation.settings, translation
    if is_yaml:
        raise UserError(f"--config {path}: it is no configuration of a trainer that is known here.")
    return config_files.flatten_tables(content, path), None


def find_importer(content: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Translation] | None:
    """Return the function that translates another trainer's file; None for a file of ours."""
    flat_names = set(content)
    for value in content.values():
        if isinstance(value, Mapping):
            flat_names |= value.keys()
    for matches, importer in IMPORTERS:
        if matches(content, flat_names):
            return importer
    return None


IMPORTERS: tuple[tuple[Callable[..., bool], Callable[..., Translation]], ...] = (
    (lambda content, names: ai_toolkit.matches_file(content), ai_toolkit.translate_config),
    (lambda content, names: onetrainer.matches_file(content), onetrainer.translate_config),
    (lambda content, names: simpletuner.matches_file(content), simpletuner.translate_config),
    (
        lambda content, names: bool(names & kohya.SIGNATURE) or is_dataset_config(content),
        kohya.translate_config,
    ),
)
"""Tests of a file's content and names, and what translates it; the first that matches counts."""


def is_dataset_config(content: Mapping[str, Any]) -> bool:
    """Return whether it is a dataset TOML of sd-scripts or musubi-tuner."""
    datasets = content.get("datasets")
    return isinstance(datasets, list) and any(
        isinstance(dataset, dict)
        and dataset.keys() & {"subsets", "image_directory", "image_jsonl_file"}
        for dataset in datasets
    )
