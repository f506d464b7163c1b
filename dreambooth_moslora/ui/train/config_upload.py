"""Button of the Train tab that fills the form from a configuration file: another trainer's, or one
of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.importers.files import load_config
from dreambooth_moslora.importers.rows import require_supported
from dreambooth_moslora.settings.parsing import parse_settings
from dreambooth_moslora.settings.prompts import parse_subject
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import MESSAGE_EVENT, on
from dreambooth_moslora.ui.train.train_form import list_form_fields

CONFIG_TYPES = [".toml", ".yaml", ".yml", ".json"]
PAGE_SETTINGS = {"pretrained_model_name_or_path", "instance_data_dir", "output_dir"}
"""Settings that the page decides: its base, the dropped photos, the run's folder."""


def build_config_button() -> gr.UploadButton:
    """Build the button."""
    return gr.UploadButton(
        "Fill in from a configuration of kohya, ai-toolkit, OneTrainer or SimpleTuner",
        file_types=CONFIG_TYPES,
        size="sm",
        elem_id="open_config",
    )


def connect_config_button(button: gr.UploadButton, fields: dict[str, Any], card: gr.HTML) -> None:
    """Fill the form's `fields` by a file, and say on the `card` which of its settings the form
    lacks."""

    @on(button.upload, MESSAGE_EVENT, inputs=button, outputs=[*fields.values(), card])
    def fill(file: str) -> list:
        path = Path(file)
        settings, translation = load_config(path)
        if translation:
            require_supported(translation)
        values, lacking = collect_field_values(parse_settings(settings))
        text = f"The form has the values of {path.name}."
        if lacking:
            text += (
                f" It has no fields for {', '.join(lacking)}: these are left as they are here. "
                "The command `train --config` takes all."
            )
        updates = [values[name] if name in values else gr.skip() for name in fields]
        return [*updates, html.render_notice(text)]


def collect_field_values(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the form's fields by name, and the settings that the form lacks."""
    values: dict[str, Any] = {}
    used = {"validation_prompt", *PAGE_SETTINGS}
    for name, row in list_form_fields().items():
        if row.setting in settings:
            value = settings[row.setting]
            used.add(row.setting)
            values[name] = value == row.switch_values[1] if row.switch_values else value
    if sample_prompts := settings.get("validation_prompt"):
        values["sample_prompts"] = "\n".join(sample_prompts)

    # The words for the subject, where the instance prompt has them
    if settings.get("instance_prompt"):
        used |= {"instance_prompt", "class_prompt"}
        subject = parse_subject(TrainConfig.from_dict(settings))
        names = {"token": subject.token, "class_word": subject.class_word}
        values |= {name: text for name, text in names.items() if text}
    return values, sorted(settings.keys() - used)
