"""The metadata of an adapter, as JSON in its file's header, and which values are valid.

Also here: what other programs compute from DoRA in kohya's form. The file names no norm, and they
take different ones. As the shapes (out, 1) and (1, in) both broadcast, none of them raises an
error.

    W' = dora_scale · (W + ΔW) / ‖W + ΔW‖       what was trained

dora_scale is (out, 1), and the norm is of each row of W + ΔW.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, field, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dreambooth_moslora import __version__
from dreambooth_moslora.errors import UserError, format_validation_error
from dreambooth_moslora.settings import config_files, rules, train_config
from dreambooth_moslora.settings.family_facts import TEXT_OPTIONS

DORA_READERS = {
    "this program, LyCORIS": "what was trained",
    "ComfyUI": "nearly that: it divides by the norms of W instead of W + ΔW",
    "AUTOMATIC1111, InvokeAI": "another adapter: they divide by the norms of columns",
    "diffusers, kohya's sd-scripts": "a plain LoRA: they drop the magnitudes",
    "others, such as Fooocus": "not known",
}
"""Programs -> what they compute from DoRA in kohya's form."""
DORA_NOTE = (
    "--use_dora: the kohya file is not the same adapter in all programs ("
    + "; ".join(f"{programs}: {what}" for programs, what in DORA_READERS.items())
    + "); pytorch_lora_weights.safetensors is exact in diffusers"
)
"""What a run with DoRA says of a UNet's two files."""
TRANSFORMER_DORA_NOTE = (
    "--use_dora: pytorch_lora_weights.safetensors is exact in diffusers; "
    "ComfyUI, where it reads the file, drops the magnitudes, which is another adapter"
)
"""What it says of a transformer's one file."""


def get_dora_note(*, has_kohya_file: bool) -> str:
    """What a run with DoRA says of its files."""
    return DORA_NOTE if has_kohya_file else TRANSFORMER_DORA_NOTE


def format_dora_table() -> str:
    """`DORA_READERS` in Markdown, for the model card."""
    rows = [f"| {programs} | {what} |" for programs, what in DORA_READERS.items()]
    return "\n".join(["| DoRA in the kohya file, read by | computes |", "|---|---|", *rows])


METADATA_KEY = "moslora"
"""Key of the metadata in a safetensors header."""


Rank = Annotated[int, Field(gt=0)]
"""A rank, or another count that begins at 1."""


STRICT_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)
"""No number is read from text, and none is infinite."""


@dataclass(frozen=True, config=STRICT_CONFIG)
class AdapterMetadata:
    """What a file says about its adapter. Nothing in it is a path, or describes photos or the
    machine. Anyone may have written the file, so each value is checked.

    `ranks` and `alphas` list the modules (`component.path`) that differ from `rank` and `alpha`.
    `recipe` holds numbers, switches and choices, never prompts or paths.

    Raises ValueError, pydantic's ValidationError, for a value of another kind.
    """

    rank: Rank
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixer: str = "none"
    train_mixer: bool = True
    mixer_seed: int = 0
    ranks: dict[str, Rank] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    base_id: str = ""
    base_architecture: dict[str, Any] = field(default_factory=dict)
    structures: dict[str, dict[str, Any]] = field(default_factory=dict)
    trigger_words: tuple[str, ...] = ()
    class_word: str = ""
    resolution_px: Rank | None = None
    versions: dict[str, str] = field(default_factory=dict)
    # `settings.config_files.build_recipe`.
    recipe: dict[str, Any] = field(default_factory=dict)
    # Of several subjects.
    subject_prompts: tuple[str, ...] = ()
    # Where the adapter was taken, if the run did not end there.
    step: Rank | None = None
    # How many trained it, if there were several.
    processes: Rank | None = None

    @property
    def header(self) -> dict[str, str]:
        """The metadata as strings of a safetensors header."""
        return {METADATA_KEY: self.to_json()}

    def to_json(self) -> str:
        """The metadata as a file holds it. Entries that later versions added are left out when
        they are empty: files keep their bytes."""
        facts = asdict(self)
        for name in LATER_ENTRIES:
            if not facts[name]:
                del facts[name]
        return json.dumps(facts, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "AdapterMetadata":
        """Ignores unknown keys. Raises ValueError for text that `to_json` does not write."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise ValueError(format_validation_error(error)) from None


LATER_ENTRIES = ("recipe", "subject_prompts", "step", "processes")
"""Entries that the first files did not have."""


def parse_metadata(header: Mapping[str, str]) -> AdapterMetadata | None:
    """The metadata in a file's header; None unless this program wrote it."""
    try:
        return AdapterMetadata.from_json(header[METADATA_KEY])
    except (KeyError, ValueError):
        return None


def parse_text_options(header: Mapping[str, str]) -> dict[str, Any]:
    """Settings of `TEXT_OPTIONS` -> the run's values, as far as the header of an adapter tells
    them."""
    facts = parse_metadata(header)
    told = {}
    if facts is None:
        return told
    for name in TEXT_OPTIONS:
        # A value that is none is left out: anyone may have written the header.
        if name in facts.recipe:
            with suppress(UserError):
                told[name] = train_config.parse_setting(name, facts.recipe[name])
    return told


def get_most_common(values: Iterable[float]) -> float:
    """The value that occurs most often, the first if several do. A file states it once for all its
    modules."""
    return Counter(values).most_common(1)[0][0]


def get_versions() -> dict[str, str]:
    """Name -> version of this package and the libraries that an adapter depends on."""
    found = {"dreambooth_moslora": __version__}
    for name in ("torch", "diffusers", "transformers", "peft"):
        version = rules.find_package_version(name)
        if version:
            found[name] = version
    return found


def add_recipe(config: train_config.TrainConfig, metadata: AdapterMetadata) -> AdapterMetadata:
    """The `facts` with what a file tells of the run's settings."""
    # A single table of subjects trains the very file that flags train.
    if len(config.subjects) == 1:
        (config,) = config.each_subject
    return replace(metadata, recipe=config_files.build_recipe(config))
