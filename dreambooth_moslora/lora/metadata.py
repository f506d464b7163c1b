"""Metadata of an adapter, as JSON in its file's header, and the values that are valid.

This module also says what other programs compute from DoRA in kohya's form. The file does not say
which norm it means, and programs take different ones. As the shapes (out, 1) and (1, in) both
broadcast, none of them raises an error.

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
from dreambooth_moslora.settings import config_files, family_facts, parsing, rules, train_config

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
    + "; ".join(f"{programs}: {computed}" for programs, computed in DORA_READERS.items())
    + "); pytorch_lora_weights.safetensors is exact in diffusers"
)
TRANSFORMER_DORA_NOTE = (
    "--use_dora: pytorch_lora_weights.safetensors is exact in diffusers; "
    "ComfyUI, where it reads the file, drops the magnitudes, which is another adapter"
)


def get_dora_note(*, has_kohya_file: bool) -> str:
    """Return the note of a run with DoRA on its files."""
    return DORA_NOTE if has_kohya_file else TRANSFORMER_DORA_NOTE


def format_dora_table() -> str:
    """Return `DORA_READERS` in Markdown, for the model card."""
    rows = [f"| {programs} | {computed} |" for programs, computed in DORA_READERS.items()]
    return "\n".join(["| DoRA in the kohya file, read by | computes |", "|---|---|", *rows])


METADATA_KEY = "moslora"
Rank = Annotated[int, Field(gt=0)]
"""A rank, or another count that begins at 1."""

STRICT_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)
"""Numbers are not read from text, and must be finite."""


@dataclass(frozen=True, config=STRICT_CONFIG)
class AdapterMetadata:
    """Metadata of an adapter. No value is a path, or describes photos or the machine.

    Anyone may have written the file, so each value is checked.

    ranks, alphas: modules (`component.path`) whose value differs from `rank` and `alpha`
    recipe: numbers, switches and choices of the run, never prompts or paths
        (`settings.config_files.build_recipe`)
    subject_prompts: of a run with several subjects
    step: of the checkpoint that was exported, if it was not the last
    processes: number of processes that trained it, if more than one

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
    recipe: dict[str, Any] = field(default_factory=dict)
    subject_prompts: tuple[str, ...] = ()
    step: Rank | None = None
    processes: Rank | None = None

    @property
    def header(self) -> dict[str, str]:
        """Metadata as strings of a safetensors header."""
        return {METADATA_KEY: self.to_json()}

    @property
    def family(self) -> family_facts.FamilyFacts:
        """Family of the denoiser in `structures`; SDXL where there is none."""
        for name in family_facts.DENOISERS:
            if model := self.structures.get(name):
                return family_facts.get_denoiser_facts(model["class"], model["config"])
        return family_facts.SDXL

    def to_json(self) -> str:
        """Return the metadata as JSON.

        Empty entries of later versions are left out, so that files keep their bytes.
        """
        facts = asdict(self)
        for name in LATER_ENTRIES:
            if not facts[name]:
                del facts[name]
        return json.dumps(facts, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "AdapterMetadata":
        """Parse text that `to_json` wrote, ignoring unknown keys. Raises ValueError for other
        text."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise ValueError(format_validation_error(error)) from None


LATER_ENTRIES = ("recipe", "subject_prompts", "step", "processes")
"""Entries that the first files did not have."""


def parse_metadata(header: Mapping[str, str]) -> AdapterMetadata | None:
    """Return the metadata in a file's header; None unless this program wrote it."""
    try:
        return AdapterMetadata.from_json(header[METADATA_KEY])
    except (KeyError, ValueError):
        return None


def parse_text_options(header: Mapping[str, str]) -> dict[str, Any]:
    """Return the run's values of the settings `TEXT_OPTIONS`, as far as the header has them."""
    metadata = parse_metadata(header)
    options = {}
    if metadata is None:
        return options
    for name in family_facts.TEXT_OPTIONS:
        # An invalid value is left out: anyone may have written the header.
        if name in metadata.recipe:
            with suppress(UserError):
                options |= parsing.parse_settings({name: metadata.recipe[name]})
    return options


def get_most_common(values: Iterable[float]) -> float:
    """Return the most common value, the first of several: a file states it once for all modules."""
    return Counter(values).most_common(1)[0][0]


def get_versions() -> dict[str, str]:
    """Return name -> version of this package and of the libraries that an adapter depends on."""
    libraries = ("torch", "diffusers", "transformers", "peft")
    versions = {name: rules.find_package_version(name) for name in libraries}
    installed = {name: version for name, version in versions.items() if version}
    return {"dreambooth_moslora": __version__} | installed


def add_recipe(config: train_config.TrainConfig, metadata: AdapterMetadata) -> AdapterMetadata:
    """Return the metadata with the run's settings added."""
    # One subject in a table gives the same file as the same settings given by flags.
    if len(config.subjects) == 1:
        (config,) = config.each_subject
    return replace(metadata, recipe=config_files.build_recipe(config))
