"""The training form as a value: few words and numbers, to a TrainConfig."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_moslora.base.locate import SMALL_BASE_PX, TOY
from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.config_files import load_settings
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.generation.params import check_characters
from dreambooth_moslora.ui.photo_uploads import kept_photos
from dreambooth_moslora.ui.training.memory_choice import memory_choice

__all__ = ["PRESETS", "Preset", "TrainForm", "crop_config", "preset_for", "prompts_of"]

MAX_WORD_CHARACTERS = 60
QUICK_START = TOY.parent / "configs" / "quickstart.toml"
LIKE_QUICK_START = (
    *("random_flip", "crops_per_photo", "crop_zoom"),
    *("target_modules", "train_batch_size", "lr_scheduler", "prior_loss_weight", "prior_prompts"),
)
"""What a run on the embedded base takes from the quick start."""
TOY_DINO = TOY.parent / "toy-dino"


@dataclass(frozen=True)
class Preset:
    steps: int
    rank: int
    learning_rate: float


PRESETS = {
    "quick": (Preset(150, 16, 2.5e-3), Preset(400, 8, 2e-4)),
    "standard": (Preset(300, 16, 2.5e-3), Preset(800, 16, 1e-4)),
    "thorough": (Preset(800, 16, 1.5e-3), Preset(1500, 32, 1e-4)),
}
"""Name -> (for a small base, for SDXL)."""


def preset_for(name: str, resolution_px: int) -> Preset:
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r:.30}; choose {', '.join(PRESETS)}")
    return PRESETS[name][resolution_px > SMALL_BASE_PX]


def prompts_of(token: str, class_word: str) -> tuple[str, str]:
    """("a photo of a sks dog", "a photo of a dog"). Raises UserError for missing or endless words."""
    token, class_word = (" ".join(str(word or "").split()) for word in (token, class_word))
    for word, name in ((token, "the token (a rare word, such as sks)"), (class_word, "the class word (such as dog)")):
        if not word:
            raise UserError(f"{name} is missing")
        if len(word) > MAX_WORD_CHARACTERS:
            raise UserError(f"{name} is too long; one to three words are enough")
        check_characters(word, name)
    return f"a photo of a {token} {class_word}", f"a photo of a {class_word}"


@dataclass(frozen=True)
class TrainForm:
    """Names of the fields are the API's argument names. 0 in a number means: as the preset says."""

    token: str
    class_word: str
    run_name: str = ""
    preset: str = "standard"
    prior_preservation: bool = False
    captions: str = ""
    rank: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    mixer: str = "orthogonal"
    seed: int = 0
    make_masks: bool = False

    def config(self, base: str, resolution_px: int, photos_dir: Path, run_dir: Path) -> dict[str, Any]:
        """Values for TrainConfig under its own names; raises UserError for what makes no sense."""
        instance_prompt, class_prompt = prompts_of(self.token, self.class_word)
        check_characters(str(self.captions or ""), "a caption")
        preset = preset_for(self.preset, resolution_px)
        steps = _whole(self.steps, "steps", 100_000) or preset.steps
        prior = {"class_prompt": class_prompt, "with_prior_preservation": True, "prior": "adapter_off"}
        own = toy_settings(steps, self.prior_preservation) if base == "toy" else {}
        values = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": str(photos_dir),
            "output_dir": str(run_dir),
            "instance_prompt": instance_prompt,
            "validation_prompt": instance_prompt,
            "num_validation_images": 2,
            "resolution": resolution_px,
            "rank": _whole(self.rank, "rank", 256) or preset.rank,
            "learning_rate": _positive(self.learning_rate, "learning rate") or preset.learning_rate,
            "max_train_steps": steps,
            "train_batch_size": 1,
            "lr_warmup_steps": 0,
            "mixer": self.mixer,
            "seed": _whole(self.seed, "seed", 2**32 - 1),
            "masks": "auto" if self.make_masks else "given",
            "validation_steps": max(1, steps // 5),
            "checkpointing_steps": max(1, steps // 5),
            "checkpoints_total_limit": 6,
            **own,
            **(prior if self.prior_preservation else {}),
        }
        is_small = resolution_px <= SMALL_BASE_PX
        return values if is_small else values | memory_choice(TrainConfig.from_dict(values))

    def write_captions(self, photos_dir: Path) -> None:
        """One line for each photo, in their order, becomes the text file beside it; empty lines are left out."""
        for photo, line in zip(kept_photos(photos_dir), str(self.captions or "").splitlines()):
            if line.strip():
                photo.with_suffix(".txt").write_text(line.strip(), encoding="utf-8")


def crop_config(base: str, resolution_px: int, photos_dir: Path, seed: Any = 0) -> TrainConfig:
    """What decides the crops of a run from this form, as `TrainForm.config` has it; the words are not asked for."""
    own = toy_settings(1, prior_preservation=False) if base == "toy" else {}
    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": str(photos_dir),
            "instance_prompt": "a photo",
            "resolution": resolution_px,
            "seed": _whole(seed, "seed", 2**32 - 1),
            **own,
        }
    )


def toy_settings(steps: int, prior_preservation: bool) -> dict[str, Any]:
    """The quick start's way of learning on the embedded base, and scores along it."""
    quick = load_settings(QUICK_START)
    names = [name for name in LIKE_QUICK_START if prior_preservation or not name.startswith("prior")]
    scored = {"evaluate_steps": max(1, steps // 5)} if TOY_DINO.is_dir() else {}
    return {name: quick[name] for name in names} | scored


def _whole(value: Any, name: str, limit: int) -> int:
    value = 0 if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= limit or not float(value).is_integer():
        raise UserError(f"{name} must be a whole number from 0 to {limit}, not {value!r:.30}")
    return int(value)


def _positive(value: Any, name: str) -> float:
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
        raise UserError(f"the {name} must be a number from 0 to 10, not {value!r:.30}")
    return float(value)
