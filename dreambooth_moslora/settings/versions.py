"""Compares the installed libraries with the tested versions, and with pairs of versions that fail together."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from dreambooth_moslora.core import UserError, clone_folder
from dreambooth_moslora.settings.table import TrainConfig

OPTIONAL = ("bitsandbytes", "prodigyopt", "schedulefree", "datasets", "tensorboard", "wandb", "trackio", "torchvision")
"""Libraries that only some settings need."""

# fmt: off
PAIRS = (
    ({"transformers": ">=5.24", "peft": "<0.22"},
        "transformers {transformers} needs peft 0.22: adapters on text encoders fail; "
        'pip install "transformers>=5.12,<5.24"'),
    ({"diffusers": "<0.42", "transformers": ">=5"},
        'diffusers {diffusers} was written for transformers 4; pip install "diffusers>=0.42,<0.43"'),
    ({"peft": "<0.17", "transformers": ">=5"},
        'peft {peft} does not know transformers 5; pip install "peft>=0.21,<0.22"'),
    ({"numpy": ">=2", "torch": "<2.3"}, "torch {torch} was built for numpy 1; upgrade torch"),
    ({"huggingface_hub": ">=1", "transformers": "<5"},
        "transformers {transformers} needs huggingface_hub below 1; upgrade transformers"),
)
"""(versions that fail together, message)."""
# fmt: on


def needed_ranges() -> dict[str, SpecifierSet]:
    """{library: tested versions} that every run needs, from pyproject.toml or the installed package's metadata."""
    clone = clone_folder()
    if clone is not None and (file := clone / "pyproject.toml").is_file():
        lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = metadata.requires("dreambooth_moslora") or []
    items = [Requirement(line) for line in lines]
    return {item.name: item.specifier for item in items if item.marker is None and item.name not in OPTIONAL}


def installed_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed versions by name, None for missing ones; nothing is imported."""
    return {name: version_of(name) for name in names}


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def require_packages(config: TrainConfig) -> None:
    """Raises UserError for the first flag whose package is missing. Without a tracker's package accelerate would log
    nothing and not say so; without the others a run would fail after its photos are encoded."""
    for item in fields(config):
        value, facts = getattr(config, item.name), item.metadata
        package = facts["packages"].get(value) if facts["packages"] else None
        if package and version_of(package) is None and not any(applies(config) for _, applies in facts["idle"]):
            flag = f"--{item.name}" if value is True else f"--{item.name} {value}"
            raise UserError(f"{flag} needs {package}: pip install {package}.")


def is_within(version: str | None, versions: SpecifierSet) -> bool:
    """Whether a version is in a range. A release candidate counts as its release; None is in no range."""
    try:
        return versions.contains(Version(version or "").base_version)
    except InvalidVersion:
        return False


def bad_pairs(installed: Mapping[str, str | None]) -> list[str]:
    known = {name: version or "" for name, version in installed.items()}
    lines = []
    for pair, line in PAIRS:
        if all(is_within(known.get(name), SpecifierSet(versions)) for name, versions in pair.items()):
            lines.append(line.format(**known))
    return lines


def out_of_range(installed: Mapping[str, str | None]) -> list[str]:
    """One line for each needed library that is missing or has an untested version."""
    lines = []
    for name, versions in needed_ranges().items():
        version, wanted = installed.get(name), name + ",".join(sorted(map(str, versions), reverse=True))
        if version is None:
            lines.append(f'{name} is missing; pip install "{wanted}"')
        elif not is_within(version, versions):
            lines.append(f"{name} {version} was not tried with this program; it was run with {wanted}")
    return lines
