"""Several subjects in one run: their tables, from TOML or a folder of folders.

In a --config file:

    [[subjects]]
    instance_data_dir = "photos/duck"
    instance_prompt = "a photo of sks duck"

With --subjects photos:

    photos/sks duck/       "a photo of a sks duck", class "a photo of a duck"

A table overrides the run's other settings. A run without tables has one subject, described by its
settings.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError

Config = Any
"""Stands for `settings.train_config.TrainConfig`, which imports this file."""
COUNT_PREFIX = re.compile(r"^\d+_")
"""Repeats in kohya's `10_sks duck`: ignored, as all subjects are trained equally often."""


def to_tables(value: Any) -> tuple[Any, ...] | None:
    """Return the tables of a folder or a list; None for anything else. Raises UserError."""
    if isinstance(value, (str, Path)):
        return list_folder_tables(Path(find_asset(str(value))))
    if not isinstance(value, (list, tuple)):
        return None
    are_tables = all(isinstance(table, Mapping) or is_dataclass(table) for table in value)
    return tuple(value) if are_tables else None


def list_folder_tables(folder: Path) -> tuple[dict[str, str], ...]:
    """Return a table for each folder in `folder`. Raises UserError if there is none."""
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"--subjects {folder}: {problem}.")
    folders = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    if not folders:
        raise UserError(
            f"--subjects {folder}: there is no folder in it; each subject has one, such as "
            "`sks dog`."
        )
    return tuple({"instance_data_dir": str(path)} | parse_folder_prompts(path) for path in folders)


def parse_folder_prompts(folder: Path) -> dict[str, str]:
    """Return instance and class prompt from the name of a subject's folder, `sks duck`.

    The first word is the token, the others are the class.
    """
    name = " ".join(COUNT_PREFIX.sub("", folder.name).replace("_", " ").split())
    token, _, noun = (name or folder.name).partition(" ")
    return build_prompts(token, noun) if noun else {"instance_prompt": f"a photo of {token}"}


def build_prompts(token: str, noun: str) -> dict[str, str]:
    """Return the settings that name a subject by its token and its class."""
    return {
        "instance_prompt": f"a photo of a {token} {noun}",
        "class_prompt": f"a photo of a {noun}",
    }


def get_seed_name(name: str, number: int) -> str:
    """Return the seed name for random numbers of subject `number`, from 0.

    The first has that of a run with one subject.
    """
    return f"{name} {number}" if number else name


def check_subjects(config: Config) -> None:
    """Raise UserError for incomplete tables, and for two subjects that cannot be told apart."""
    # A run with tables must not describe a single subject too.
    defaults = {item.name: item.default for item in fields(config)}
    for name in ("instance_data_dir", "instance_prompt"):
        if getattr(config, name) != defaults[name]:
            raise UserError(
                f"--subjects and --{name}: each subject names its own; give one of the two."
            )

    # Build the run of each table, which checks it.
    runs = []
    for number, table in enumerate(config.subjects, 1):
        for name in ("instance_data_dir", "instance_prompt"):
            if not str(getattr(table, name) or "").strip():
                raise UserError(f"--subjects: number {number} has no {name}.")
        try:
            runs.append(config.build_subject_config(table))
        except UserError as error:
            raise UserError(f"subject {number} ({table.instance_data_dir}): {error}") from error

    # Subjects of the same photos or prompts cannot be told apart.
    for name in ("instance_data_dir", "instance_prompt"):
        values = [getattr(run, name) for run in runs]
        if name == "instance_data_dir":
            values = [os.path.normpath(value) for value in values]
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise UserError(
                f"--subjects: {count} of them have the {name} {value!r}; each needs its own."
            )
