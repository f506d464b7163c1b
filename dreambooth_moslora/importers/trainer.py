"""The steps by which a configuration of any other trainer becomes settings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dreambooth_moslora.importers.datasets import complete_subjects, translate_datasets
from dreambooth_moslora.importers.rows import DEFAULT_SOURCE, Table, Translation
from dreambooth_moslora.settings.setting_names import SETTINGS

COMMON_DEFAULTS = {
    "mixer": "none",
    "instance_prompt": "",
    "instance_prompt_share": 0.0,
    "center_crop": True,
    "lr_warmup_steps": 0,
    "optimizer": "AdamW",
}
"""Settings that mean what all other trainers do where they are silent."""
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "AdamW": {"adam_weight_decay": 0.01},
    "Prodigy": {
        "adam_weight_decay": 0.0,
        "prodigy_use_bias_correction": False,
        "prodigy_safeguard_warmup": False,
    },
}
"""Optimizer -> arguments that its package has where they are not ours; others do not decay."""
Datasets = Iterable[tuple[Mapping[str, Any], bool]]
"""Values of each dataset, and whether its images are those of the class."""


@dataclass(frozen=True)
class Trainer:
    """Trainer whose configurations are read.

    matches: whether a file's content is its configuration
    read_values: returns the flat values of a content, and its datasets; may report what it leaves
        out
    complete: stores what depends on several values
    defaults: its own where a configuration is silent
    """

    name: str
    table: Table
    dataset_table: Table
    matches: Callable[[Mapping[str, Any]], bool]
    read_values: Callable[[Mapping[str, Any], Translation], tuple[dict[str, Any], Datasets]]
    complete: Callable[[Translation, dict[str, Any]], None]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def translate_config(self, content: Mapping[str, Any]) -> Translation:
        """Return the settings of a configuration. Raises UserError for a file that it names and
        that cannot be read."""
        translation = Translation(self.name)
        values, datasets = self.read_values(content, translation)
        translation.translate_values(self.table, values)
        translate_datasets(translation, self.dataset_table, datasets)
        self.complete(translation, values)

        # Defaults: the trainer's, then those of all, then the optimizer's
        translation.add_defaults(dict(self.defaults))
        translation.add_defaults(COMMON_DEFAULTS)
        complete_subjects(translation)
        settings = translation.settings
        optimizer = str(settings["optimizer"])
        translation.add_defaults(OPTIMIZER_DEFAULTS.get(optimizer, {"adam_weight_decay": 0.0}))
        decay = settings["adam_weight_decay"]
        translation.add_defaults({"adam_weight_decay_text_encoder": decay})

        # A default of frozen text encoders would be remarked on, though nobody gave it.
        if not settings.get("train_text_encoder"):
            for name in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
                if translation.sources.get(name) == DEFAULT_SOURCE:
                    del settings[name]
        translation.settings = {name: settings[name] for name in SETTINGS if name in settings}
        return translation
