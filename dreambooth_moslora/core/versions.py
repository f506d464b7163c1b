"""The libraries that are installed, against what was run together and against pairs that are known to fail."""

import re
from collections.abc import Mapping
from importlib import metadata

from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.errors import UserError

__all__ = ["OPTIONAL", "RANGES", "bad_pairs", "installed_versions", "out_of_range", "require_packages"]

RANGES = {
    "torch": ("2.9", "3"),
    "diffusers": ("0.42", "0.43"),
    "transformers": ("5.12", "5.24"),
    "peft": ("0.21", "0.22"),
    "accelerate": ("1.15", "2"),
    "safetensors": ("0.6", "1"),
    "huggingface_hub": ("2.4", "3"),
    "Pillow": ("12", "13"),
    "pillow-heif": ("1.1", "2"),
    "numpy": ("2", "3"),
    "gradio": ("6.31", "7"),
}
"""First version that was run, first that was not; as in requirements.txt."""
OPTIONAL = ("bitsandbytes", "prodigyopt", "datasets", "tensorboard", "wandb", "trackio", "torchvision")

PAIRS = (
    (
        lambda v: at_least(v, "transformers", "5.24") and below(v, "peft", "0.22"),
        "transformers {transformers} needs peft 0.22: adapters on text encoders fail; "
        'pip install "transformers>=5.12,<5.24"',
    ),
    (
        lambda v: below(v, "diffusers", "0.42") and at_least(v, "transformers", "5"),
        'diffusers {diffusers} was written for transformers 4; pip install "diffusers>=0.42,<0.43"',
    ),
    (
        lambda v: below(v, "peft", "0.17") and at_least(v, "transformers", "5"),
        'peft {peft} does not know transformers 5; pip install "peft>=0.21,<0.22"',
    ),
    (
        lambda v: at_least(v, "numpy", "2") and below(v, "torch", "2.3"),
        "torch {torch} was built for numpy 1; upgrade torch",
    ),
    (
        lambda v: at_least(v, "huggingface_hub", "1") and below(v, "transformers", "5"),
        "transformers {transformers} needs huggingface_hub below 1; upgrade transformers",
    ),
)
"""(whether a pair fails, what to say and do)."""


def installed_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Without importing them."""
    return {name: version_of(name) for name in names}


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def require_packages(config: TrainConfig) -> None:
    """Raises UserError for the first flag whose package is missing. Without a tracker's, accelerate would log nothing,
    and say nothing; without the others' a run would end when its photos are encoded.
    """
    has_tracker = config.report_to not in ("none", "all", "tensorboard")
    needs = (
        (f"--report_to {config.report_to}", config.report_to, has_tracker),
        ("--optimizer Prodigy", "prodigyopt", config.optimizer == "Prodigy"),
        ("--use_8bit_adam", "bitsandbytes", config.use_8bit_adam and config.optimizer == "AdamW"),
        (f"--base_quantization {config.base_quantization}", "bitsandbytes", config.base_quantization != "none"),
    )
    for flag, package, is_needed in needs:
        if is_needed and version_of(package) is None:
            raise UserError(f"{flag} needs {package}: pip install {package}.")


def numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0); a release candidate counts as the release."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def at_least(versions: Mapping[str, str | None], name: str, bound: str) -> bool:
    version = versions.get(name)
    return version is not None and numbers(version) >= numbers(bound)


def below(versions: Mapping[str, str | None], name: str, bound: str) -> bool:
    version = versions.get(name)
    return version is not None and numbers(version) < numbers(bound)


def bad_pairs(versions: Mapping[str, str | None]) -> list[str]:
    """One line for each pair that fails."""
    known = {name: version or "" for name, version in versions.items()}
    return [line.format(**known) for fails, line in PAIRS if fails(versions)]


def out_of_range(versions: Mapping[str, str | None]) -> list[str]:
    """One line for each needed library that is missing or was not run in this version."""
    lines = []
    for name, (first, end) in RANGES.items():
        version = versions.get(name)
        if version is None:
            lines.append(f'{name} is missing; pip install "{name}>={first},<{end}"')
        elif not (at_least(versions, name, first) and below(versions, name, end)):
            lines.append(f"{name} {version} was not tried with this program; it was run with {first} up to below {end}")
    return lines
