"""Reads the subjects of a fleet into the settings of one run each.

SUBJECTS/NAME/*.jpg           a folder of folders; `subject.json` {"token", "class_word"} in each
                              says what it shows
[[subjects]] folder = "…"     a TOML list; a CSV file has a column per name, a JSONL file a line
                              per subject

A list's names are `folder`, `token`, `class`, `name` (of the run folder; by default the folder's
name), and any training setting. A subject's own settings override the shared ones. A subject that
cannot be trained keeps its reason and does not stop the others.
"""

import csv
import os
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.digests import RECORD, list_files
from dreambooth_moslora.disk.contents import (
    hash_files,
    hash_values,
    parse_json,
    read_json,
    read_small_text,
)
from dreambooth_moslora.disk.paths import (
    MAX_WORD_CHARACTERS,
    SUBJECT_FILE,
    expand_user_path,
    find_asset,
)
from dreambooth_moslora.disk.run_folder import check_name, find_weights
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.extras.cluster import records
from dreambooth_moslora.plan.defaults import DEFAULT_TOKEN
from dreambooth_moslora.settings import config_files, parsing, train_config
from dreambooth_moslora.settings.subjects import build_prompts

ROW_COLUMNS = ("folder", "token", "class", "class_word", "name")
"""Names of a list that are no settings of a training."""
SET_BY_FLEET_NOTE = "a fleet sets it for each run; leave it out"
REFUSED_SETTINGS = {
    "instance_data_dir": SET_BY_FLEET_NOTE,
    "subjects": SET_BY_FLEET_NOTE,
    "output_dir": SET_BY_FLEET_NOTE,
    "resume_from_checkpoint": SET_BY_FLEET_NOTE,
    "hub_token": (
        "it would be written to every run's folder; log in on the machines (`hf auth login`)"
    ),
}
"""Settings that a subject must not have, and why."""
FLEET_FILES = (records.FLEET_NAME, records.STOP_NAME, records.INDEX_NAME)
"""Names in the fleet's folder that no subject can have."""
PATH_SETTINGS = ("instance_data_dir", "output_dir")
"""Settings that say where a run is, not what it is."""
HUB_FOLDER = "models--"
"""How the folder of a model begins in the hub's cache."""


@dataclass(frozen=True)
class Subject:
    """Run of a fleet: `name` of its run folder and its training `settings`. `error` says why it
    cannot be trained."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def read_subjects(source: Path, shared: Mapping[str, Any], out: Path) -> list[Subject]:
    """Read the subjects in the order of the list, or by name. `shared`: settings of all; run
    folders are made in `out`. Raises UserError for a list that cannot be read or is empty, and for
    two subjects of one name."""
    # what no two runs can share
    refuse_settings({name: value for name, value in shared.items() if value})
    if shared.get("hub_model_id"):
        raise UserError(
            "--hub_model_id: the subjects would overwrite each other; name it in each one's row."
        )

    source = Path(find_asset(str(source)))
    subjects = [parse_subject(row, shared, out) for row in read_rows(source)]
    if not subjects:
        raise UserError(f"{source}: it contains no subject.")

    # a name is that of a run folder, and some file systems do not tell `Rex` from `rex`
    counts = Counter(subject.name.casefold() for subject in subjects)
    duplicates = sorted(subject.name for subject in subjects if counts[subject.name.casefold()] > 1)
    if duplicates:
        raise UserError(
            f"{source}: {duplicates[-1]} is there twice; give one of them another name."
        )
    return subjects


def refuse_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError for a setting in REFUSED."""
    if refused_names := [name for name in settings if name in REFUSED_SETTINGS]:
        raise UserError(f"--{refused_names[0]}: {REFUSED_SETTINGS[refused_names[0]]}.")


def read_rows(source: Path) -> list[dict[str, Any]]:
    """Read the rows of a list, or make one for each folder. Raises UserError."""
    if source.is_dir():
        folders = [path for path in sorted(source.iterdir()) if path.is_dir()]
        return [{"folder": str(path)} for path in folders if not path.name.startswith(".")]

    # a list, in one of three formats
    kind = source.suffix.lower()
    if kind not in (".toml", ".csv", ".jsonl"):
        raise UserError(
            f"{source}: give a folder of subject folders, or a .toml, .csv or .jsonl list of them."
        )
    if source.exists() and not source.is_file():
        raise UserError(f"{source} is not a regular file.")
    try:
        text = read_small_text(source)
        if "\0" in text:
            raise ValueError("it is not a text file")
        return list(parse_rows(text, kind))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: {config_files.explain_read_error(error)}.") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{source} is not a list of subjects: {error}.") from error


def parse_rows(text: str, kind: str) -> Iterator[dict[str, Any]]:
    """Parse the rows of a list's text. Empty cells are left out. Raises ValueError, and
    csv.Error."""
    # a row with the names, then a row for each subject
    if kind == ".csv":
        reader = csv.DictReader(text.splitlines(), strict=True)
        if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
            raise ValueError(f"the column {twice[0]!r:.40} is there twice")
        for row in reader:
            if None in row:
                raise ValueError(f"a line has more cells than the first: {row[None][0]!r}")
            yield {name.strip(): value for name, value in row.items() if value}
        return

    # an object on each line
    if kind == ".jsonl":
        yield from (parse_json(line) for line in text.splitlines() if line.strip())
        return

    # a table for each subject
    values = tomllib.loads(text)
    rows = values.get("subjects")
    is_list = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if set(values) != {"subjects"} or not is_list:
        raise ValueError("it has [[subjects]] tables and nothing else")
    yield from rows


def parse_subject(row: Mapping[str, Any], shared: Mapping[str, Any], out: Path) -> Subject:
    """Parse a row; a mistake in it becomes the subject's `error`. Raises UserError without a folder
    or a usable name."""
    row = {name.replace("-", "_"): value for name, value in row.items()}

    # without a folder or a name there is no place for the error
    folder = row.get("folder")
    if not isinstance(folder, str) or not folder:
        raise UserError(f"a subject has no folder: {row!r:.80}.")
    photos = Path(find_asset(folder))
    try:
        name = str(row.get("name") or photos.resolve().name)
        os.stat(photos)
    except FileNotFoundError:
        pass  # which `build_settings` says
    except (OSError, ValueError) as error:
        raise UserError(f"{folder!r:.80} cannot be a folder: {format_error(error)}.") from error
    check_name(name)
    refused = f"{name!r} cannot be the name of a subject"
    if name.startswith("."):
        raise UserError(f"{refused}: it begins with a dot.")
    if name.lower() in FLEET_FILES:
        raise UserError(f"{refused}: the fleet has a file of that name.")
    try:
        return Subject(name, build_settings(row, photos, shared, out / name))
    except UserError as error:
        return Subject(name, error=str(error))


def build_settings(
    row: Mapping[str, Any], photos: Path, shared: Mapping[str, Any], run_dir: Path
) -> dict[str, Any]:
    """Build the settings of one run.

    row: of the list, which overrides `shared`
    photos: the folder of its photos, which may have a `subject.json`
    shared: settings of all runs
    run_dir: where the run writes

    Raises UserError for settings that no run can have.
    """
    row_settings = {name: value for name, value in row.items() if name not in ROW_COLUMNS}
    refuse_settings(row_settings)
    parsing.parse_settings(row_settings)
    if not photos.is_dir():
        raise UserError(f"{photos}: {'not a folder' if photos.exists() else 'no such folder'}.")

    # the words: of the row, else of the folder's file
    facts = read_json(photos / SUBJECT_FILE) if (photos / SUBJECT_FILE).is_file() else {}
    word = row.get("class") or row.get("class_word") or facts.get("class_word")
    token = row.get("token") or facts.get("token") or shared.get("token") or DEFAULT_TOKEN
    for kind, text in (("token", token), ("class", word)):
        is_word = isinstance(text, str) and text.isprintable()
        if word and not (is_word and len(text) <= MAX_WORD_CHARACTERS):
            raise UserError(
                f"the {kind} {text!r:.40} is no word: "
                f"give at most {MAX_WORD_CHARACTERS} letters on a line."
            )

    # the row's own settings come last, so that they count
    settings = {**shared, **(build_prompts(token, word) if word else {}), **row_settings}
    if not settings.get("instance_prompt"):
        raise UserError(
            f"{photos} does not say what it shows: "
            "give its class, a subject.json, or --instance_prompt."
        )
    settings |= {"instance_data_dir": str(photos.resolve()), "output_dir": str(run_dir)}
    train_config.TrainConfig.from_dict(settings)
    return settings


def digest_run(settings: Mapping[str, Any]) -> str:
    """Return a digest of the settings and of the files that the training reads, wherever they lie:
    another means another run. Raises UserError and OSError for files that cannot be read."""
    config = train_config.TrainConfig.from_dict(settings)
    caches = config.cache_folder

    # digests are remembered: of the photos for each folder, so that no record grows with the fleet
    photos = Path(config.instance_data_dir)
    record = caches / "photos" / f"{hash_values(folder=str(photos))}.json"
    files = list_visible(photos)
    digests = hash_files(files, record)
    shared = list_shared(config)
    files += shared
    digests += hash_files(shared, caches / RECORD)

    values = config.to_dict()
    placeless = {name: values[name] for name in values if name not in PATH_SETTINGS}
    file_digests = [(path.name, digest) for path, digest in zip(files, digests, strict=True)]
    return hash_values(settings=placeless, files=file_digests)


def list_visible(folder: Path) -> list[Path]:
    """Return the files in a folder, by name, without hidden ones, which no training reads."""
    paths = sorted(folder.iterdir())
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


def list_shared(config: train_config.TrainConfig) -> list[Path]:
    """Return the files that a training reads beside its photos: of a base that is here, of what it
    begins with, and the user's own class images. Raises UserError and OSError."""
    # the base; the hub's own files have a revision, and may be fetched only by the training
    base = Base.of(config)
    listed: list[Path] = []
    if base.source != "hub":
        for part in (base.facts.denoiser, *base.facts.encoders, "vae"):
            for path in list_files(base, base.facts, part):
                if not any(folder.startswith(HUB_FOLDER) for folder in path.parts):
                    listed.append(path)

    # what the training begins with, such as another adapter
    for name in train_config.START_FILE_SETTINGS:
        value = getattr(config, name)
        path = expand_user_path(value or "")
        if value and path.is_dir():
            is_adapter = name in ("init_adapter", "companion")
            listed += [find_weights(path)] if is_adapter else list_visible(path)
        elif path.is_file():
            listed.append(path)

    # a training adds class images of its own
    images = Path(config.class_data_dir or "")
    if config.with_prior_preservation and config.class_data_dir and images.is_dir():
        from dreambooth_moslora.training.class_images import GENERATED_PATTERN

        listed += [
            path for path in list_visible(images) if not GENERATED_PATTERN.fullmatch(path.name)
        ]
    return listed
