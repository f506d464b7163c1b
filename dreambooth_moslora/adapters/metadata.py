"""The metadata of an adapter, as JSON in its file's header, and which values are valid.

Also here: what other programs compute from DoRA in kohya's form. The file names no norm, and they take different ones;
as the shapes (out, 1) and (1, in) both broadcast, none of them raises an error.

    trained:   W' = dora_scale · (W + ΔW) / ‖W + ΔW‖       dora_scale (out, 1), the norm of each row of W + ΔW
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from dreambooth_moslora import __version__
from dreambooth_moslora.core import UserError, is_finite_number
from dreambooth_moslora.disk.run_folder import header_of, keys_of
from dreambooth_moslora.settings import rules, sources, table
from dreambooth_moslora.settings.families import TEXT_OPTIONS

DORA_READERS = {  # programs -> what they compute
    "this program, LyCORIS": "what was trained",
    "ComfyUI": "nearly that: it divides by the norms of W instead of W + ΔW",
    "AUTOMATIC1111, InvokeAI": "another adapter: they divide by the norms of columns",
    "diffusers, kohya's sd-scripts": "a plain LoRA: they drop the magnitudes",
    "others, such as Fooocus": "not known",
}
DORA_NOTE = (
    "--use_dora: the kohya file is not the same adapter in all programs ("
    + "; ".join(f"{programs}: {what}" for programs, what in DORA_READERS.items())
    + "); pytorch_lora_weights.safetensors is exact in diffusers"
)
DORA_OF_TRANSFORMERS = (
    "--use_dora: pytorch_lora_weights.safetensors is exact in diffusers, and in ComfyUI a plain LoRA, which is another "
    "adapter: it drops the magnitudes"
)


def dora_note(*, has_kohya_file: bool) -> str:
    return DORA_NOTE if has_kohya_file else DORA_OF_TRANSFORMERS


def dora_table() -> str:
    rows = [f"| {programs} | {what} |" for programs, what in DORA_READERS.items()]
    return "\n".join(["| DoRA in the kohya file, read by | computes |", "|---|---|", *rows])


HEADER = "moslora"  # key of the metadata in a safetensors header


def is_rank(value: object) -> bool:
    return type(value) is int and value > 0


Check = Callable[[object], bool]
is_bool, is_text, is_dict = (lambda value, kind=kind: isinstance(value, kind) for kind in (bool, str, dict))


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def named(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def listed(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def is_note(value: object, names: set[str]) -> bool:
    """Whether it has these names, each with a text, and a plain file name: anyone may write a header."""
    is_known = isinstance(value, dict) and value.keys() == names and named(is_text)(value)
    return is_known and PurePath(value["file"]).name == value["file"]


def is_token_note(value: object) -> bool:
    if not isinstance(value, dict) or not is_rank(value.get("count")):
        return False
    texts = {name: text for name, text in value.items() if name != "count"}
    return is_note(texts, {"word", "file", "sha256"}) and texts["word"].strip() != "" and texts["file"] != ""


def checked(is_valid: Callable[[object], bool], **default: Any) -> Any:
    """A field and whether a value in a file is valid for it; anyone may have written the file."""
    return field(metadata={"is_valid": is_valid}, **default)


@dataclass(frozen=True)
class AdapterMetadata:
    """What a file says about its adapter; nothing in it is a path or describes photos or the machine. `ranks` and
    `alphas` list the modules (`component.path`) that differ from `rank` and `alpha`; `best_scale` and `usable_scales`
    (lowest, highest) were measured. `recipe` holds numbers, switches and choices, never prompts or paths."""

    rank: int = checked(is_rank)
    alpha: float = checked(is_finite_number)
    use_rslora: bool = checked(is_bool, default=False)
    use_dora: bool = checked(is_bool, default=False)
    lora_dropout: float = checked(lambda value: is_finite_number(value) and 0 <= value < 1, default=0.0)
    mixer: str = checked(lambda value: value in (*table.MIXERS, table.ZERO), default="none")
    train_mixer: bool = checked(is_bool, default=True)
    mixer_seed: int = checked(lambda value: type(value) is int, default=0)
    mixer_factor: int = checked(lambda value: value == 0 or is_rank(value), default=0)
    ranks: Mapping[str, int] = checked(named(is_rank), default_factory=dict)
    alphas: Mapping[str, float] = checked(named(is_finite_number), default_factory=dict)
    base_id: str = checked(is_text, default="")
    base_architecture: Mapping[str, object] = checked(is_dict, default_factory=dict)
    structures: Mapping[str, Mapping[str, object]] = checked(named(is_dict), default_factory=dict)
    trigger_words: tuple[str, ...] = checked(listed(is_text), default=())
    class_word: str = checked(is_text, default="")
    resolution_px: int | None = checked(or_none(is_rank), default=None)
    versions: Mapping[str, str] = checked(named(is_text), default_factory=dict)
    best_scale: float | None = checked(or_none(is_finite_number), default=None)
    usable_scales: tuple[float, ...] = checked(lambda v: listed(is_finite_number)(v) and len(v) in (0, 2), default=())
    recipe: Mapping[str, object] = checked(is_dict, default_factory=dict)  # for `--like` (`settings.sources`)
    tokens: tuple[dict[str, object], ...] = checked(
        lambda value: value == {} or is_token_note(value) or listed(is_token_note)(value), default=()
    )  # `NewTokens.note` of each file
    subject_prompts: tuple[str, ...] = checked(listed(is_text), default=())  # of several subjects
    basis: Mapping[str, str] = checked(
        lambda value: value == {} or is_note(value, {"kind", "sha256", "file"}), default_factory=dict
    )  # of the frozen A and B
    step: int | None = checked(or_none(is_rank), default=None)  # if the run did not end there
    processes: int | None = checked(or_none(is_rank), default=None)  # if there were several

    @property
    def factor(self) -> int:
        """The rows and columns of a LoKr's W₁; 1 for other mixers."""
        return (self.mixer_factor or 1) if self.mixer == table.KRONECKER else 1

    @property
    def header(self) -> dict[str, str]:
        return {HEADER: self.to_json()}

    def to_json(self) -> str:
        """Leaves out later entries when empty, and a list around one subject's tokens: files keep their bytes."""
        facts = asdict(self)
        if len(self.tokens) == 1:
            facts["tokens"] = self.tokens[0]
        later = ("best_scale", "usable_scales", "recipe", "tokens", "subject_prompts", "basis")
        later += ("step", "processes", "mixer_factor")
        return json.dumps({name: value for name, value in facts.items() if value or name not in later}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "AdapterMetadata":
        """Ignores unknown keys. Raises ValueError or TypeError for text that `to_json` does not write."""
        try:
            stored = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deep") from None
        if not isinstance(stored, dict):
            raise TypeError("the metadata is not an object")
        fields = cls.__dataclass_fields__
        known = {name: value for name, value in stored.items() if name in fields}
        if wrong := next((name for name, value in known.items() if not fields[name].metadata["is_valid"](value)), None):
            raise ValueError(f"{wrong} is {known[wrong]!r:.60}")
        if isinstance(note := known.get("tokens"), dict):
            known["tokens"] = [note] if note else []
        lists = ("trigger_words", "usable_scales", "subject_prompts", "tokens")
        return cls(**{**known, **{name: tuple(known.get(name, ())) for name in lists}})


def metadata_in(header: Mapping[str, str]) -> AdapterMetadata | None:
    """The metadata in a file's header; None unless this program wrote it."""
    try:
        return AdapterMetadata.from_json(header[HEADER])
    except (KeyError, TypeError, ValueError):
        return None


def notes_in(header: Mapping[str, str]) -> tuple[dict, ...]:
    """Each `NewTokens.note` in the header of an adapter."""
    return facts.tokens if (facts := metadata_in(header)) else ()


def text_options_in(header: Mapping[str, str]) -> dict[str, Any]:
    """Settings of `TEXT_OPTIONS` -> the run's values, as far as the header of an adapter tells them."""
    facts = metadata_in(header)
    if facts is None:
        return {}
    told, _ = sources.checked_recipe({name: facts.recipe[name] for name in TEXT_OPTIONS if name in facts.recipe})
    return told


BUNDLE = "bundle_emb."  # OneTrainer keeps new tokens in the adapter's own file: `bundle_emb.WORD.clip_l` and so on


def bundled(keys: Iterable[str]) -> dict[str, list[str]]:
    """Word -> the names of its tensors (`clip_l`), of the keys of an adapter with bundled new tokens."""
    found = defaultdict(list)
    for key in sorted(key for key in keys if key.startswith(BUNDLE)):
        word, _, name = key.removeprefix(BUNDLE).rpartition(".")
        found[word].append(name)
    return found


def check_start_file(file: Path) -> None:
    """Raises UserError for an adapter that no run can begin with, and for any other file than safetensors."""
    words = [note["word"] for note in notes_in(header_of(file))] + [*bundled(keys_of(file))]
    if words:
        raise UserError(f"it has learnt new tokens for {words[0]!r:.40}, and no run begins with such an adapter")


def most_common(values: Iterable[float]) -> float:
    """The value that occurs most often, the first if several do. A file states it once for all its modules."""
    return Counter(values).most_common(1)[0][0]


def versions() -> dict[str, str]:
    """Name -> version of this package and the libraries that an adapter depends on."""
    others = {name: rules.version_of(name) for name in ("torch", "diffusers", "transformers", "peft")}
    return {"dreambooth_moslora": __version__} | {name: found for name, found in others.items() if found}


def with_recipe(config: table.TrainConfig, facts: AdapterMetadata) -> AdapterMetadata:
    """The `facts` with what a file tells of the run's settings."""
    if len(config.subjects) == 1:  # a single table trains the very file that flags train
        (config,) = config.each_subject
    return replace(facts, recipe=sources.recipe_of(config))
