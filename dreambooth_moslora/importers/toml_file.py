"""Write a translation as a TOML file of this program, with what each line was there."""

import json
from typing import Any

from dreambooth_moslora.errors import escape_control_characters
from dreambooth_moslora.importers.rows import DEFAULT_SOURCE, Translation


def format_toml(translation: Translation, file_name: str) -> str:
    """Return the text of a TOML file. Keys without a counterpart are comments."""
    lines = [f"# Converted from {file_name} of {translation.trainer}."]
    for name, value in translation.settings.items():
        source = translation.sources.get(name, "")
        if name == "subjects" or translation.is_default(name):
            continue
        if source == DEFAULT_SOURCE:
            source = f"default of {translation.trainer}"
        comment = f"  # {source}" if source else ""
        lines.append(f"{name} = {format_toml_value(value)}{comment}")

    # What became no setting
    for title, texts in (
        ("Not supported here", translation.unsupported),
        (
            "No effect here",
            [f"{key}: {', '.join(row)}" for key, row in translation.ignored.items()],
        ),
        ("Unknown here", translation.unknown),
    ):
        lines += ["", f"# {title}:"] if texts else []
        lines += [f"#   {' '.join(text.split())}" for text in texts]
    for subject in translation.settings.get("subjects", ()):
        lines += ["", "[[subjects]]"]
        lines += [f"{name} = {format_toml_value(value)}" for name, value in subject.items()]
    return "".join(f"{escape_control_characters(line)}\n" for line in lines)


def format_toml_value(value: Any) -> str:
    """Return a number, switch, text or list in TOML, which has JSON's form of them."""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
