"""Datasets of another trainer's file: folders of photos that become one subject or several, and
folders of class images."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.importers.rows import Table, Translation
from dreambooth_moslora.settings import setting_names

REPEATS_FOLDER = re.compile(r"(?P<repeats>\d+)_(?P<name>.+)")
"""Folder of sd-scripts: `10_sks dog` is shown ten times an epoch; its name is the caption."""
SUBJECT_SETTINGS = setting_names.list_settings("per_subject")


def list_repeats_folders(parent: Path) -> list[tuple[Path, str, int]]:
    """Return each folder such as `10_sks dog` in a folder, its prompt and its repeats."""
    folders = []
    paths = parent.glob("*") if os.path.isdir(parent) else ()
    for folder in sorted(path for path in paths if path.is_dir()):
        match = REPEATS_FOLDER.fullmatch(folder.name)
        if match:
            prompt = " ".join(match["name"].replace("_", " ").split())
            folders.append((folder, prompt, int(match["repeats"])))
    return folders


def translate_datasets(
    translation: Translation, table: Table, datasets: Iterable[tuple[Mapping[str, Any], bool]]
) -> None:
    """Translate datasets by the rows of a table.

    datasets: the values of each, and whether its images are those of the class
    """
    photo_settings = []
    for values, is_class in datasets:
        part = replace(translation, settings={}, sources={})
        part.translate_values(table, values)
        folder = part.settings.get("instance_data_dir")
        if folder and is_class:
            prior = {"with_prior_preservation": True, "class_data_dir": folder}
            if part.settings.get("instance_prompt"):
                prior["class_prompt"] = part.settings["instance_prompt"]
            translation.set_values(prior, "regularization images")
        elif folder:
            photo_settings.append(part.settings)
    set_photos(translation, photo_settings)


def set_photos(translation: Translation, datasets: Sequence[Mapping[str, Any]]) -> None:
    """Store the settings of folders of photos: of one subject, or a table for each folder."""
    # A folder may be named once for each resolution.
    folders: dict[str, dict[str, Any]] = {}
    for dataset in datasets:
        folder = folders.setdefault(dataset["instance_data_dir"], dict(dataset) | {"sides": []})
        folder["sides"] += [dataset.get("resolution"), *dataset.get("more_resolutions", ())]
    tables = [table | split_resolutions(table.pop("sides")) for table in folders.values()]

    # A setting that subjects do not have on their own has the first folder's value.
    shared = {name: value for table in reversed(tables) for name, value in table.items()}
    if len(tables) > 1:
        subjects = [
            {name: str(value) for name, value in table.items() if name in SUBJECT_SETTINGS}
            for table in tables
        ]
        shared = {name: value for name, value in shared.items() if name not in SUBJECT_SETTINGS}
        for name, value in shared.items():
            if any(table.get(name) != value for table in tables):
                translation.ignore(f"{name} of single folders", f"all have {value}")
        shared["subjects"] = subjects
    if shared:
        translation.set_values(shared, "datasets")


def split_resolutions(sides: Iterable[Any]) -> dict[str, Any]:
    """Return the settings of one or several resolutions, px."""
    largest, *smaller = sorted({int(side) for side in sides if side}, reverse=True) or [None]
    settings: dict[str, Any] = {"resolution": largest} if largest else {}
    return settings | ({"more_resolutions": smaller} if smaller else {})


def complete_subjects(translation: Translation) -> None:
    """Move what names a single subject into the tables of several, and name the classes.

    Where class images have no prompt, the class is the last word of the instance prompt.
    """
    settings = translation.settings
    if "subjects" in settings:
        common = {name: settings.pop(name) for name in SUBJECT_SETTINGS if name in settings}
        settings["subjects"] = [common | table for table in settings["subjects"]]
        prompts = {table.get("instance_prompt") for table in settings["subjects"]}
        if len(prompts) < len(settings["subjects"]):
            translation.unsupported.append("several folders with one prompt: join their photos")
    if not settings.get("with_prior_preservation"):
        return
    for table in settings.get("subjects", [settings]):
        _, space, class_word = str(table.get("instance_prompt") or "").rpartition(" ")
        if space and not table.get("class_prompt"):
            table["class_prompt"] = f"a photo of a {class_word}"


def list_mappings(value: Any) -> list[dict[str, Any]]:
    """Return copies of the mappings in a list."""
    return [dict(item) for item in to_list(value) if isinstance(item, Mapping)]


def to_list(value: Any) -> list[Any]:
    """Return a list of a value, of a list, or of None."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
