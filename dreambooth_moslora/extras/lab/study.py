"""Comparison as data: arms × ranks × subjects × seeds at an equal budget.

It is read from one TOML file:

    [study]       subjects, tuning_subjects, seeds, ranks, learning_rates, reference, budget, tie
    [evaluation]  num_prompts, images_per_prompt, class_images, unrelated, inference_steps, clip,
                  dino
    [train]       any setting of train_dreambooth.py, the same for every arm
    [arms.NAME]   the settings in which this arm differs;
                  config = "recipe.toml" reads them from a file;
                  by_references = true trains nothing: the base is shown photos beside each prompt

Each (arm, rank) first tries every learning rate on the tuning subjects; the best one is used on the
others. An arm with its own learning rate keeps it. A subject is its photos and prompts:

    "photos/duck"             with photos/duck/subject.json
    {photos = "photos/duck", instance_prompt = "a photo of a sks duck", class_prompt = "…"}
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from dreambooth_moslora.base.base import BASE_SETTINGS, Base
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import SUBJECT_FILE, find_asset
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan import defaults
from dreambooth_moslora.plan.validation import check_references
from dreambooth_moslora.settings import config_files
from dreambooth_moslora.settings.parsing import parse_settings
from dreambooth_moslora.settings.subjects import build_prompts
from dreambooth_moslora.settings.train_config import TrainConfig


@dataclass(frozen=True)
class StudySubject:
    """Subject of a study.

    photos: its folder
    instance_prompt: its prompt
    class_prompt: of its class; without one, prior preservation needs one in [train]
    """

    photos: str
    instance_prompt: str
    class_prompt: str | None = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return Path(self.photos).resolve().name

    @property
    def settings(self) -> dict[str, str]:
        """Settings of its training."""
        settings = {"instance_data_dir": self.photos, "instance_prompt": self.instance_prompt}
        if self.class_prompt:
            settings["class_prompt"] = self.class_prompt
        return settings

    @classmethod
    def from_entry(cls, entry: str | Mapping[str, Any]) -> "StudySubject":
        """Raise UserError when the folder does not exist or does not name its subject."""
        # a table of texts
        values = dict(entry) if isinstance(entry, Mapping) else {"photos": entry}
        names = [item.name for item in fields(cls)]
        is_known = values.keys() <= set(names)
        if not is_known or not all(isinstance(text, str) for text in values.values()):
            raise UserError(
                f"the study's subject {entry!r}: a folder, or a table of texts, {', '.join(names)}."
            )
        if not values.get("photos"):
            raise UserError(f"the study's subject {entry!r} has no photos: name their folder.")
        folder = Path(find_asset(values["photos"]))
        if not folder.is_dir():
            raise UserError(
                f"the study's subject {folder}: no such folder; "
                "paths start at the current directory."
            )

        # its words: of the study, else of the folder's file
        if "instance_prompt" in values:
            return cls(
                photos=str(folder),
                instance_prompt=values["instance_prompt"],
                class_prompt=values.get("class_prompt"),
            )
        facts_path = folder / SUBJECT_FILE
        if not facts_path.is_file():
            example = f'{{photos = "{folder}", instance_prompt = "a photo of a sks dog"}}'
            raise UserError(
                f"the study's subject {folder} has no subject.json: "
                f"give it an instance_prompt, {example}."
            )
        facts = read_json(facts_path)
        token = facts.get("token")
        word = facts.get("class_word")
        if not token or not word:
            raise UserError(
                f"{facts_path} must name the token and the class_word, "
                "or the study an instance_prompt."
            )
        return cls(photos=str(folder), **build_prompts(token, word))


SECTIONS = ("study", "evaluation", "train", "arms")
"""The tables of the file."""
REFERENCES_SETTING = "by_references"
"""Says of an arm that it trains nothing, and draws by photos beside each prompt."""
BUDGETS = ("parameters", "rank")
"""In what arms can be equal."""
LIST_TYPES = {"seeds": ((int,), 0), "ranks": ((int,), 1), "learning_rates": ((int, float), 0)}
"""Lists of numbers -> their types, and the lowest number."""


@dataclass(frozen=True)
class Protocol:
    """Protocol by which each adapter is scored.

    num_prompts: of the subject
    images_per_prompt: with a seed each
    class_images: pictures of the class
    unrelated: prompts without the subject
    inference_steps: of each picture
    clip, dino: hub ids or folders of the encoders, if not the default ones

    Raises UserError.
    """

    num_prompts: int = 8
    images_per_prompt: int = 1
    class_images: int = 4
    unrelated: int = 2
    inference_steps: int = 20
    clip: str = ""
    dino: str = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            is_text = isinstance(item.default, str)
            if type(value) is not type(item.default) or not (is_text or value >= 1):
                kind = "a text" if is_text else "a whole number from 1 on"
                raise UserError(f"the study's evaluation.{item.name} is {kind}, not {value!r}.")


@dataclass(frozen=True)
class Cell:
    """Training and its scores.

    stage: "tune" or "test"
    arm, subject: their names
    rank: the nominal one (see `Study.budget`)
    """

    stage: str
    arm: str
    rank: int
    subject: str
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Name of the cell that a file can have."""
        prefix = f"{self.stage}-{self.arm}-r{self.rank}-{self.subject}"
        return f"{prefix}-s{self.seed}-lr{self.learning_rate:g}"


@dataclass(frozen=True)
class Study:
    """Study: what is compared, and how.

    subjects: on which arms are compared
    arms: the settings in which each differs
    train: settings of all arms
    tuning_subjects: on which learning rates are chosen
    seeds: each subject is trained once with each
    ranks: nominal ones
    learning_rates: to choose from
    reference: the arm with which the others are compared
    budget: "parameters": each arm's rank is nearest to plain LoRA's in parameters; "rank": the
        nominal one
    tie: pictures closer than this many deviations of the reference's are equal
    protocol: how adapters are scored

    Raises UserError.
    """

    subjects: tuple[StudySubject, ...]
    arms: dict[str, dict[str, Any]]
    train: dict[str, Any]
    tuning_subjects: tuple[StudySubject, ...] = ()
    seeds: tuple[int, ...] = (0, 1)
    ranks: tuple[int, ...] = (4,)
    learning_rates: tuple[float, ...] = (1e-4,)
    reference: str = "lora"
    budget: str = "parameters"
    tie: float = 0.25
    protocol: Protocol = field(default_factory=Protocol)

    def __post_init__(self) -> None:
        # each value alone
        for name in ("subjects", "arms", "seeds", "ranks", "learning_rates"):
            if not getattr(self, name):
                raise UserError(f"the study has no {name}.")
        if isinstance(self.tie, bool) or not isinstance(self.tie, (int, float)) or self.tie < 0:
            raise UserError(f"the study's tie is a number from 0 on, not {self.tie!r}.")
        if self.reference not in list(self.arms):
            names = ", ".join(self.arms)
            raise UserError(
                f"the study's reference {self.reference!r} is none of its arms: {names}."
            )
        if self.budget not in BUDGETS:
            raise UserError(
                f"the study's budget {self.budget!r}: choose one of {', '.join(BUDGETS)}."
            )

        # subjects, which must differ
        names = [subject.name for subject in self.subjects + self.tuning_subjects]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(
                f"the study names {', '.join(sorted(twice))} twice; "
                "subjects must not be used for tuning."
            )
        if len(self.learning_rates) > 1 and not self.tuning_subjects:
            raise UserError("several learning rates need tuning_subjects to choose between them.")

    @property
    def base(self) -> Base:
        """Base of all arms. Raises UserError."""
        return find_base(self.train)

    def get_subject(self, name: str) -> StudySubject:
        """Return the subject of that name, for comparing or tuning."""
        return next(s for s in self.subjects + self.tuning_subjects if s.name == name)

    def should_train(self, arm: str) -> bool:
        """Return whether the arm is trained; else it draws by references."""
        return not self.arms[arm].get(REFERENCES_SETTING)

    def list_rates(self, arm: str) -> tuple[float, ...]:
        """List the learning rates to choose from; an arm with a rate of its own keeps it."""
        arm_rate = self.arms[arm].get("learning_rate") if self.should_train(arm) else 0.0
        return self.learning_rates if arm_rate is None else (float(arm_rate),)

    def get_first_rates(self) -> dict[tuple[str, int], float]:
        """(arm, rank) -> the first of its rates, which is the only one of an arm with its own."""
        return {
            (arm, rank): self.list_rates(arm)[0] for arm, rank in product(self.arms, self.ranks)
        }

    def list_tuning_cells(self) -> list[Cell]:
        """List all arms with several rates, on the tuning subjects, with the first seed."""
        cells = []
        for subject, rank, arm in product(self.tuning_subjects, self.ranks, self.arms):
            # nothing is to choose for an arm with one rate
            rates = self.list_rates(arm)
            if len(rates) < 2:
                continue
            for rate in rates:
                cell = Cell(
                    stage="tune",
                    arm=arm,
                    rank=rank,
                    subject=subject.name,
                    seed=self.seeds[0],
                    learning_rate=rate,
                )
                cells.append(cell)
        return cells

    def list_test_cells(self, rates: Mapping[tuple[str, int], float]) -> list[Cell]:
        """List all arms on the other subjects, each at the rate chosen for (arm, rank); whole
        comparisons finish first."""
        cells = []
        for seed, subject, rank, arm in product(self.seeds, self.subjects, self.ranks, self.arms):
            cell = Cell(
                stage="test",
                arm=arm,
                rank=rank,
                subject=subject.name,
                seed=seed,
                learning_rate=rates[arm, rank],
            )
            cells.append(cell)
        return cells

    def build_config(self, cell: Cell, rank: int, output_dir: Path) -> TrainConfig:
        """Build the settings of the cell's training at its real `rank`; arms share the seed. Raises
        UserError."""
        shared = {**self.train, **self.arms[cell.arm]}
        shared.pop(REFERENCES_SETTING, None)
        subject = self.get_subject(cell.subject)

        # the cell's own, and nothing that costs time beside the training
        cell_settings = {
            "output_dir": str(output_dir),
            "rank": rank,
            "seed": cell.seed,
            "learning_rate": cell.learning_rate,
            "num_validation_images": 0,
            "report_to": "none",
            "checkpointing_steps": 10**9,
        }
        return TrainConfig.from_dict({**shared, **subject.settings, **cell_settings})

    def digest(self, cell: Cell, materials: Sequence[str] = ()) -> str:
        """Changes with anything that the cell's result depends on. `materials`: the content of its
        files."""
        subject_facts = asdict(self.get_subject(cell.subject))
        protocol = asdict(self.protocol)
        facts = [*materials, self.train, self.arms[cell.arm], protocol, subject_facts, self.budget]
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def load_study(path: Path) -> Study:
    """Read the file. Raises UserError for anything unknown, missing or contradictory."""
    # the tables, with known names
    values = config_files.read_tables(path)
    refuse_unknown(path, "", values, SECTIONS)
    study_table, protocol, shared, arms = (
        require_table(path, name, values.get(name, {})) for name in SECTIONS
    )
    refuse_unknown(path, "study.", study_table, [f.name for f in fields(Study)])
    refuse_unknown(path, "evaluation.", protocol, [f.name for f in fields(Protocol)])

    # [study]: numbers and subjects
    study_table |= {
        name: require_numbers(path, name, study_table[name])
        for name in LIST_TYPES
        if name in study_table
    }
    for name in ("subjects", "tuning_subjects"):
        folders = study_table.get(name, [])
        if not isinstance(folders, list):
            raise UserError(f"--config {path}: study.{name} is a list of folders, not {folders!r}.")
        study_table[name] = tuple(map(StudySubject.from_entry, folders))

    # [train] and [arms]: settings of a training
    arms = {
        name: resolve_settings(require_table(path, f"arms.{name}", arm))
        for name, arm in arms.items()
    }
    parse_settings(shared)
    for name, settings in arms.items():
        by_references = settings.get(REFERENCES_SETTING, False)
        if not isinstance(by_references, bool):
            raise UserError(
                f"--config {path}: arms.{name}.{REFERENCES_SETTING} is true or false, "
                f"not {by_references!r}."
            )
        parse_settings({key: settings[key] for key in settings if key != REFERENCES_SETTING})

    # each arm's resolution; not in `train`, whose digest is a part of the results' names
    for settings in arms.values():
        sized = defaults.Choices({"pretrained_model_name_or_path": "toy"} | shared | settings)
        defaults.choose_resolution(sized)
        settings |= sized.settings
    study = Study(arms=arms, train=shared, protocol=Protocol(**protocol), **study_table)
    refuse_other_bases(study)
    for cell in study.list_test_cells(study.get_first_rates()):
        # find mistakes in any arm before the first training
        config = study.build_config(cell, cell.rank, Path("run"))
        if not study.should_train(cell.arm):
            check_references(study.base, config, f"{REFERENCES_SETTING} of the arm {cell.arm}")
    return study


def refuse_other_bases(study: Study) -> None:
    """Raise UserError if an arm has another base than `train`: all are drawn with that one."""
    for arm, settings in study.arms.items():
        if find_base({**study.train, **settings}) != study.base:
            names = ", ".join(BASE_SETTINGS.values())
            raise UserError(
                f"the study's arm {arm} has another base than [train], "
                f"which draws all arms: {names}."
            )


def find_base(settings: Mapping[str, Any]) -> Base:
    """Find the base that a training starts from. Raises UserError for one that does not exist."""
    return Base.of({"pretrained_model_name_or_path": "toy"} | dict(settings))


def require_table(path: Path, name: str, value: Any) -> dict[str, Any]:
    """Return the value of `name`, which must be a table. Raises UserError."""
    if not isinstance(value, Mapping):
        raise UserError(f"--config {path}: {name} is a table of settings, [{name}], not {value!r}.")
    return dict(value)


def require_numbers(path: Path, name: str, value: Any) -> tuple:
    """Return the value of `name`, one of LISTS. Raises UserError."""
    kinds, low = LIST_TYPES[name]
    if not isinstance(value, list) or not all(type(v) in kinds and v >= low for v in value):
        kind = "numbers" if float in kinds else "whole numbers"
        raise UserError(
            f"--config {path}: study.{name} is a list of {kind} from {low} on, not {value!r}."
        )
    return tuple(value)


def resolve_settings(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the arm's settings over those of the file that `config = "recipe.toml"` names. Raises
    UserError."""
    settings = dict(arm)
    recipe = settings.pop("config", None)
    return {**config_files.load_settings(recipe), **settings} if recipe else settings


def refuse_unknown(path: Path, where: str, values: Mapping[str, Any], allowed_names) -> None:
    """Raise UserError for a name in the table `where` that is not in `allowed_names`."""
    for name in values:
        if name not in allowed_names:
            raise UserError(
                f"--config {path}: unknown {where}{name}; known are {', '.join(allowed_names)}."
            )
