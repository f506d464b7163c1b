"""All settings of a training run in one frozen dataclass: the flags of diffusers' script, and more.

`TrainConfig` is plain data that the whole program reads and none changes. Each field's metadata has the
setting's help, bounds and choices for the command line, the configuration files and the web page.
`photo_settings`, `training_settings` and `run_settings` define the fields, `checks` the rules between them.
`files` and `cli.parser` read values from files and flags.
"""

import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from dreambooth_moslora.core.assets import find_asset
from dreambooth_moslora.core.config.checks import check_together
from dreambooth_moslora.core.config.fields import check_limits, convert, field_types, nearest
from dreambooth_moslora.core.config.run_settings import RunSettings
from dreambooth_moslora.core.config.subject_tables import SubjectTable
from dreambooth_moslora.core.config.training_settings import OPTIMIZERS, SCHEDULE_FREE
from dreambooth_moslora.core.errors import UserError

__all__ = ["FIELD_TYPES", "REMOVED", "TrainConfig", "check_each", "checked_setting", "is_scored", "without_removed"]


@dataclass(frozen=True)
class TrainConfig(RunSettings):
    """Values are converted and checked on construction; UserError names the wrong setting and the reason.

    None means "not set" where it is allowed. Lengths ending in `_steps` count optimizer steps; sizes are px.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, checked(item, getattr(self, item.name)))
        check_together(self)

    @property
    def keeps_text_encoders(self) -> bool:
        """Whether the steps use the text encoders, so that they stay in memory."""
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def bare_share(self) -> float:
        """The share of exposures with the instance prompt, of photos whose captions lack it. A data set's captions are
        used as they are, as diffusers' scripts do, unless a share was given."""
        if self.instance_prompt_share is not None:
            return self.instance_prompt_share
        return 1 / 3 if self.caption_column is None else 0.0

    @property
    def sample_count(self) -> int:
        """Sample images each time, unless `loop.set_up` leaves them out."""
        return 4 if self.num_validation_images is None else self.num_validation_images

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Settings by name, as from a file. Raises UserError for an unknown name and suggests the nearest known one."""
        check_each(values)
        return cls(**without_removed(values))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of all settings but the secret ones, for `from_dict`."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata["secret"]}
        return {name: plain(value) for name, value in shown.items()}


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [item.to_dict() if isinstance(item, SubjectTable) else item for item in value]
    return value


def is_scored(config: TrainConfig) -> bool:
    """Whether the run draws pictures to score them."""
    return bool(config.evaluate_steps or config.find_scale)


PATH_NAMES = ("_dir", "_checkpoint", "_name_or_path", "_adapter", "basis")
"""Settings whose names end so are paths; `~` is expanded, since no shell expands it in files and after `=`."""
FIELD_TYPES = field_types(TrainConfig)
SPELLINGS = {"optimizer": {name.lower(): name for name in OPTIMIZERS} | {"schedulefree": SCHEDULE_FREE}}
"""Other spellings, in lower case, of a setting's choices."""


REMOVED = dict.fromkeys(
    ("new_backgrounds", "background_scenes"), "removed, as the project's study showed no gain from new backgrounds"
)
"""Settings of earlier versions -> why they are gone. Files of runs that did not use them hold them as 0 or []."""


def checked(item: Field, value: Any) -> Any:
    """The value of one setting, converted and within its limits. Raises UserError."""
    value = convert(item.name, value, FIELD_TYPES[item.name])
    value = SPELLINGS.get(item.name, {}).get(str(value).lower(), value)
    check_limits(item, value)
    if item.name == "instance_data_dir" and value:
        return find_asset(value)
    return os.path.expanduser(value) if value and item.name.endswith(PATH_NAMES) else value


def checked_setting(name: str, value: Any) -> Any:
    """The value of a setting as the configuration will hold it. Raises UserError for a wrong value."""
    return checked(TrainConfig.__dataclass_fields__[name], value)


def check_each(values: Mapping[str, Any]) -> None:
    """Check each given setting; others may be missing. Raises UserError for a wrong name or value.

    A setting in REMOVED may be given if it is off.
    """
    items = {item.name: item for item in fields(TrainConfig)}
    for name, value in values.items():
        if name in items:
            checked(items[name], value)
        elif value or name not in REMOVED:
            raise UserError(unknown_setting(name))


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that an earlier version may have trained, without those in REMOVED."""
    return {name: value for name, value in values.items() if name not in REMOVED}


def unknown_setting(name: str) -> str:
    if name in REMOVED:
        return f"`{name}`: {REMOVED[name]}."
    close = nearest(name.replace("-", "_"), FIELD_TYPES)
    return f"unknown setting `{name}`" + (f": did you mean `{close}`?" if close else "; see --help.")
