"""The metadata of an adapter, as JSON in its file's header: which values are valid, and what it tells of the settings.

recipe     numbers, switches and choices
public     prompts and a variant that a recipe in `assets/configs` has too
withheld   names, without values, of the other settings that shaped the weights: prompts, file names, folders

Also here: what other programs compute from DoRA in kohya's form. The file names no norm, and they take different ones;
as the shapes (out, 1) and (1, in) both broadcast, none of them raises an error.

    trained:   W' = dora_scale · (W + ΔW) / ‖W + ΔW‖       dora_scale (out, 1), the norm of each row of W + ΔW
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from dreambooth_moslora import __version__
from dreambooth_moslora.core import UserError, assets_folder, is_finite_number
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


PUBLIC = ("variant", "prior_prompts")  # settings whose value a file tells if a recipe in `assets/configs` has the same
VARIANT = re.compile(r"\w[\w-]{0,19}")
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


def are_public(value: object) -> bool:
    """Whether they are settings of PUBLIC. A variant becomes a part of a file's name, so it must be a word."""
    if not isinstance(value, dict) or not value.keys() <= set(PUBLIC):
        return False
    variant, prompts = value.get("variant"), value.get("prior_prompts", [])
    return (variant is None or (is_text(variant) and bool(VARIANT.fullmatch(variant)))) and listed(is_text)(prompts)


def checked(is_valid: Callable[[object], bool], **default: Any) -> Any:
    """A field and whether a value in a file is valid for it; anyone may have written the file."""
    return field(metadata={"is_valid": is_valid}, **default)


@dataclass(frozen=True)
class AdapterMetadata:
    """What a file says about its adapter; nothing in it is a path or describes photos or the machine. `ranks` and
    `alphas` list the modules (`component.path`) that differ from `rank` and `alpha`; `best_scale` and `usable_scales`
    (lowest, highest) were measured. `public` and `withheld` are explained above."""

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
    public: Mapping[str, object] = checked(are_public, default_factory=dict)
    withheld: tuple[str, ...] = checked(listed(is_text), default=())
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
        later += ("public", "withheld", "step", "processes", "mixer_factor")
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
        lists = ("trigger_words", "usable_scales", "subject_prompts", "tokens", "withheld")
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
    """Settings of `TEXT_OPTIONS` -> the run's values, in the header of an adapter; None for one that is withheld."""
    facts = metadata_in(header)
    if facts is None:
        return {}
    told, _ = sources.checked_recipe({name: facts.recipe[name] for name in TEXT_OPTIONS if name in facts.recipe})
    return told | {name: None for name in TEXT_OPTIONS if name in facts.withheld}


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


KNOWN_BASES = ("toy", "stabilityai/stable-diffusion-xl-base-1.0")  # Loaded when a stranger's file names them
RESUMED = "resume_from_checkpoint"  # In `withheld`: resumed with other settings or photos than it began with
DEFAULTS = table.TrainConfig()
FIRST = ("instance_prompt", "subjects", "dataset_name", "leave_out", "caption_prefix", "caption_suffix", "init_adapter")
FIRST += ("pretrained_vae_model_name_or_path",)
"""Settings that `withheld` lists first, whatever their order in the table, so that files keep their bytes."""
UNTOLD = (*FIRST, *(name for name, item in table.SETTINGS.items() if item.metadata["shapes"] and name not in FIRST))
"""Settings that may shape the weights and that a recipe may lack, but for those that other entries have."""


def with_told(config: table.TrainConfig, facts: AdapterMetadata) -> AdapterMetadata:
    """The `facts` of a run, whose words and base are set, with the recipe and all else that they tell of `config`."""
    if len(config.subjects) == 1:  # a single table trains the very file that flags train
        (config,) = config.each_subject
    facts = replace(facts, recipe=sources.recipe_of(config))
    known = concluded(facts)
    by_subject = table.SAID_BY_SUBJECTS if config.subjects else ()
    asked = [name for name in UNTOLD if table.shapes_weights(name, config) and name not in by_subject]
    asked = [name for name in asked if name not in facts.recipe]
    open_ = [name for name in asked if getattr(config, name) != known.get(name, getattr(DEFAULTS, name))]
    usual = (DEFAULTS, *shipped_recipes())
    public = {name: getattr(config, name) for name in PUBLIC if name in open_}
    public = {name: value for name, value in public.items() if value in [getattr(one, name) for one in usual]}
    return replace(facts, public=public, withheld=tuple(name for name in open_ if name not in public))


def concluded(facts: AdapterMetadata) -> dict[str, Any]:
    """The settings that a reader takes from the header beside the recipe, converted."""
    found: dict[str, Any] = {"class_word": facts.class_word or None}
    if facts.base_id in KNOWN_BASES and not Path(facts.base_id).exists():
        found["pretrained_model_name_or_path"] = facts.base_id
    if len(facts.trigger_words) == 1:
        found["instance_prompt"] = f"a photo of a {facts.trigger_words[0]}"
    if facts.class_word and facts.recipe.get("with_prior_preservation"):
        found["class_prompt"] = f"a photo of a {facts.class_word}"
    if len(facts.tokens) == 1:
        found["token_abstraction"] = facts.tokens[0]["word"]
    alike = [one for one in shipped_recipes() if sources.recipe_of(one) == facts.recipe]
    found |= {name: getattr(one, name) for one in alike for name in PUBLIC}
    return found | {name: table.checked_setting(name, value) for name, value in facts.public.items()}


def told_by(facts: AdapterMetadata) -> bool:
    """Whether the file surely lists its private settings; files of earlier versions do not."""
    return bool(facts.public or facts.withheld or facts.step or facts.processes)


@lru_cache(maxsize=1)
def shipped_recipes() -> tuple[table.TrainConfig, ...]:
    files = sorted((assets_folder() / "configs").glob("*.toml"))
    return tuple(table.TrainConfig.from_dict(sources.load_settings(file)) for file in files)
