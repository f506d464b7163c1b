"""Where settings come from: TOML and JSON files, the recipe in an adapter's header, another
trainer's header.

    --config FILE --load_settings--> settings
    --like FILE   --recipe_in_file--> FoundRecipe --unless_given--> settings

The recipe of a run is what a published adapter file tells of its settings: numbers, switches,
choices and names of layers, never paths, prompts or words. Anyone may have written a header,
kohya's (`ss_*`) or one like ours: only settings that a recipe may hold are taken, and each is
checked. What the user says overrides them.
"""

import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import from_json, read_json, reason_of, small_text
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, header_of
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.settings.table import (
    ALIASES,
    FIELD_TYPES,
    SETTINGS,
    TrainConfig,
    checked_setting,
    named,
)


def load_settings(path: Path | str) -> dict[str, Any]:
    """The file's settings by name. Tables are flattened: `[training] seed = 1` becomes `seed = 1`.
    Raises UserError."""
    return flatten(read_tables(path), Path(path))


def read_tables(path: Path | str) -> dict[str, Any]:
    """The content of a --config file, with its tables. Raises UserError."""
    path = Path(find_asset(str(path)))
    try:
        return read_json(path) if path.suffix.lower() == ".json" else read_toml(path)
    except UserError as error:
        raise UserError(f"--config {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The file's names and values. Raises UserError naming it."""
    try:
        return tomllib.loads(small_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: it is not valid TOML: {error}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {reason_of(error)}.") from error


def flatten(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Nested tables as one table. Raises UserError for a setting that is given twice."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_table = isinstance(value, dict)
        plain = name.replace("-", "_")
        inner = flatten(value, path) if is_table else {ALIASES.get(plain, plain): value}
        twice = flat.keys() & inner.keys()
        if twice:
            raise UserError(f"--config {path}: {', '.join(sorted(twice))} is given twice.")
        flat |= inner
    return flat


# The settings that every recipe tells, and those that it tells if they differ from the default.
RECIPE = named("publish", "always")
TOLD_IF_CHANGED = named("publish", "if_changed")
LAYERS = tuple(name for name in RECIPE if FIELD_TYPES[name][0] is tuple)
DEFAULTS = TrainConfig().to_dict()
# A name of layers, with a value if it is a pattern. It cannot hold text of the user's.
LAYER = re.compile(r"[A-Za-z0-9_.*\[\]?!-]{1,100}(\s*[=:]\s*[0-9.eE+-]{1,20})?")


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """JSON-ready values of the settings in RECIPE that are set."""
    settings = config.to_dict()
    for name in LAYERS:
        settings[name] = [text for text in settings[name] if LAYER.fullmatch(text)]
    if settings["caching"] == "disk":  # the bytes are those of "memory"
        settings["caching"] = DEFAULTS["caching"]
    changed = [name for name in TOLD_IF_CHANGED if settings[name] != DEFAULTS[name]]
    return {name: settings[name] for name in (*RECIPE, *changed) if settings[name] is not None}


def checked_recipe(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The valid settings of a recipe, converted, and an error line for each of the others."""
    taken = {}
    wrong = []
    for name, value in values.items():
        try:
            if name not in (*RECIPE, *TOLD_IF_CHANGED):
                raise UserError(f"`{name:.40}` is not a setting of a recipe")
            # A run with this setting alone checks it; prior preservation also needs a class.
            config = TrainConfig(class_prompt="a class", **{name: value})
            found = getattr(config, name)
            if name in LAYERS and not all(LAYER.fullmatch(text) for text in found):
                raise UserError(f"--{name} names no layers")
            taken[name] = found
        except UserError as error:
            wrong.append(one_line(str(error).rstrip("."), 100))
    return taken, wrong


# What kohya writes for a setting that is not given, and for one that is switched off.
UNSET = ("", "None", "{}", "[]")
OFF = (*UNSET, "False", "0", "0.0")
FACT = re.compile(
    r"ss_(sd_|new_sd_|vae_|new_vae_|session_|training_|output_name|dataset|bucket_info"
    r"|reg_dataset|tag_freq|v2$|base_model_version|steps$|epoch$|num_(train|reg)_images"
    r"|num_batches|network_module|cache_latents|lowram|full_fp16|max_token_length"
    r"|total_batch_size)"
)
"""Keys of kohya's that state facts, not settings."""


def by_kohya_key() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, item in SETTINGS.items():
        for key in item.metadata["kohya"].split():
            found.setdefault(key, {})[name] = item.metadata["of_kohya"]
    return found


KOHYA = by_kohya_key()
"""kohya's key -> settings that it means, and how their values are read. The values are not checked
yet."""


@dataclass(frozen=True)
class FoundRecipe:
    """What a header says of a run."""

    settings: dict[str, Any]  # valid ones
    without_equivalent: tuple[str, ...] = ()  # kohya's keys
    invalid: tuple[str, ...] = ()  # a line for each wrong value

    @property
    def remarks(self) -> list[str]:
        lines = []
        if self.without_equivalent:
            keys = one_line(", ".join(self.without_equivalent), 600)
            lines.append(f"without an equivalent here: {keys}")
        if self.invalid:
            problems = one_line("; ".join(self.invalid), 600)
            lines.append(f"ignored, as they are invalid: {problems}")
        return lines


def settings_like(path: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The recipe's settings that are not `given`, and lines about them; `path`: file or run. Raises
    UserError."""
    file = Path(find_asset(path))
    try:
        # A run's recipe is in the adapter that it published.
        file = file / PUBLISHED_NAME if file.is_dir() else file
        if not file.is_file():
            raise UserError("there is no such file")
        found = recipe_in_file(file)
    except UserError as error:
        raise UserError(f"--like {path}: {error}.") from error
    settings = unless_given(found.settings, given)
    said = f"settings like {Path(path).name}: {len(settings)} (--like; flags and --config win)"
    return settings, [said, *found.remarks]


def recipe_in_file(file: Path) -> FoundRecipe:
    """The recipe in the file's header. Raises UserError for a file without one, and for another
    kind of file."""
    return recipe_in(header_of(file))


def recipe_in(header: Mapping[str, str]) -> FoundRecipe:
    """This program's recipe, else kohya's settings. Raises UserError for a header without one of
    these."""
    # Our own recipe comes first; a broken one of ours may stand beside kohya's keys.
    facts = {}
    with suppress(UserError):
        facts = from_json(header.get("moslora", "{}"))
    values = facts.get("recipe")
    meaningless: list[str] = []
    if not isinstance(values, dict):
        values, meaningless = from_kohya(header)
    if not values:
        raise UserError("its header holds no recipe, neither ours nor kohya's (ss_*)")

    # One wrong value costs that value; a header with no right one is no recipe.
    settings, wrong = checked_recipe(values)
    if not settings:
        raise UserError(f"none of its settings is valid: {one_line('; '.join(wrong))}")
    return FoundRecipe(
        settings=settings,
        without_equivalent=tuple(meaningless),
        invalid=tuple(wrong),
    )


def unless_given(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not `given` themselves or replaced by given ones. Raises UserError for
    a wrong value."""
    gone = set(given)
    for name, item in SETTINGS.items():
        replaced = item.metadata["replaces"]
        if replaced and name in given and checked_setting(name, given[name]):
            gone |= set(replaced)
    return {name: value for name, value in settings.items() if name not in gone}


def from_kohya(header: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Values of the `ss_*` keys that have an equivalent, by this program's names, and the keys
    without one."""
    # A key without an equivalent is named only if it switches something on.
    values = {}
    meaningless = []
    for key in sorted(header):
        if not key.startswith("ss_") or FACT.match(key):
            continue
        text = header[key].strip()
        if key in KOHYA and text not in UNSET:
            found = {name: read(text) for name, read in KOHYA[key].items()}
            values |= {name: value for name, value in found.items() if value is not None}
        elif key not in KOHYA and text not in OFF:
            meaningless.append(key)
    if "(" in header.get("ss_optimizer", "").removesuffix("()"):
        meaningless.append("the arguments in ss_optimizer")
    return values, meaningless
