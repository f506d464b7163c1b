"""Settings of one run, and what follows from several of them. Their rows are in `setting_rows`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import field_facts, rules
from dreambooth_moslora.settings.parsing import SubjectTable, parse_settings
from dreambooth_moslora.settings.setting_names import (
    SETTINGS,
    list_settings,
    name_arguments_in_errors,
)
from dreambooth_moslora.settings.setting_rows import SettingRows

if TYPE_CHECKING:
    from typing import Unpack

    from dreambooth_moslora.settings.train_settings import TrainSettings

START_FILE_SETTINGS = ("init_adapter", "companion", "pretrained_vae_model_name_or_path")
"""Files that a training begins with: other content makes another run."""


@dataclass(frozen=True, init=False)
class TrainConfig(SettingRows):
    """Settings of a run. Values are converted as those of the command line (`rank="16"` is 16) and
    checked on construction.

    UserError names the wrong setting and the reason. None means "not set" where it is allowed.
    Lengths ending in `_steps` count optimizer steps; sizes are px. `base` is a short name of
    `pretrained_model_name_or_path`.
    """

    def __init__(self, **settings: "Unpack[TrainSettings]") -> None:
        with name_arguments_in_errors():
            self._convert(settings)

    def _convert(self, settings: Mapping[str, Any]) -> None:
        """Fill all fields. Raises UserError."""
        values = {name: item.default for name, item in SETTINGS.items()} | parse_settings(settings)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        rules.check_combinations(self)

    @property
    def base(self) -> str:
        """Base model, `pretrained_model_name_or_path`."""
        return self.pretrained_model_name_or_path

    @cached_property
    def each_subject(self) -> tuple["TrainConfig", ...]:
        """Settings of 1 to n runs, each with one of the run's subjects alone."""
        if not self.subjects:
            return (self,)
        return tuple(map(self.build_subject_config, self.subjects))

    def build_subject_config(self, table: SubjectTable) -> "TrainConfig":
        """Return the settings with this subject alone. Raises UserError."""
        shared = {name: getattr(self, name) for name in SETTINGS} | {"subjects": ()}
        return TrainConfig.from_dict(shared | table.to_dict())

    @property
    def cache_folder(self) -> Path:
        """Folder of encodings for all runs: `--cache_dir`, else in `$XDG_CACHE_HOME` or
        `~/.cache`."""
        if self.cache_dir:
            return Path(self.cache_dir)
        caches = Path(os.environ.get("XDG_CACHE_HOME") or expanduser("~/.cache"))
        return caches / "dreambooth_moslora"

    @property
    def output_folders(self) -> dict[str, Path]:
        """Folders that the run writes to, except class images, by the settings that name them."""
        folders = {"output_dir": Path(self.output_dir)}
        if self.caching == "disk":
            folders["cache_dir"] = self.cache_folder
        return folders

    @property
    def uses_class_images(self) -> bool:
        return self.with_prior_preservation and self.prior == "class_images"

    @property
    def is_scored(self) -> bool:
        return bool(self.evaluate_steps)

    @property
    def images_per_micro_batch(self) -> int:
        """Photos and their prior images of one micro-batch."""
        return self.train_batch_size * (2 if self.with_prior_preservation else 1)

    @property
    def images_per_pass(self) -> int:
        """Most images that pass through the denoiser together.

        They are whole micro-batches, or a part of one, which has photos alone or prior images
        alone.
        """
        per_micro_batch = self.images_per_micro_batch
        limit = self.images_at_once or per_micro_batch
        if limit < per_micro_batch:
            return min(limit, self.train_batch_size)
        return min(limit // per_micro_batch, self.gradient_accumulation_steps) * per_micro_batch

    @property
    def bare_prompt_share(self) -> float:
        """Share of exposures with the instance prompt, of photos whose captions lack it."""
        return 1 / 4 if self.instance_prompt_share is None else self.instance_prompt_share

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the square crops, px, the largest first."""
        return (self.resolution, *map(int, self.more_resolutions))

    @property
    def has_buckets(self) -> bool:
        """Whether crops have several sizes, so that a batch must choose one."""
        return self.enable_bucket or bool(self.more_resolutions)

    @property
    def sample_count(self) -> int:
        """Number of sample images each time."""
        return 4 if self.num_validation_images is None else self.num_validation_images

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Build the settings from values of a file or of flags.

        Raises UserError, which names flags, for an unknown name with the most similar setting.
        """
        config = cls.__new__(cls)
        config._convert(values)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values of all settings but the secret ones, for `from_dict`."""
        values = {name: getattr(self, name) for name in list_settings("secret", False)}
        # JSON has lists and tables in place of tuples and subjects.
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        subject_tables = [subject.to_dict() for subject in self.subjects]
        return values | lists | {"subjects": subject_tables}


def get_rank_and_alpha(config: TrainConfig, component: str, path: str) -> tuple[int, float]:
    """Return rank and alpha of one layer; without an alpha, it equals the layer's rank.

    Patterns do not apply to text encoders.
    """
    rank = alpha = None
    if not component.startswith("text_encoder"):
        rank = field_facts.find_pattern_value(config.rank_pattern, "rank_pattern", path)
        alpha = field_facts.find_pattern_value(config.alpha_pattern, "alpha_pattern", path)
    rank = rank or config.rank
    alpha = alpha or config.lora_alpha or rank
    return int(rank), float(alpha)


def count_layer_parameters(config: TrainConfig, rank: int, width: int) -> int:
    """Return how many numbers of A, B and M one layer learns; `width` sums its inputs and
    outputs."""
    has_mixer = config.mixer != "none" and config.train_mixer
    return rank * width + (rank**2 if has_mixer else 0)


def check_rank(mixer: str, rank: int) -> None:
    """Raise UserError for a rank that the mixer's M cannot have."""
    if mixer == "butterfly" and rank % 2:
        raise UserError(f"mixer butterfly needs an even rank, not {rank}")
