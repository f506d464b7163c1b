"""A subject of a study: its photos and prompts, and its companions.

    "photos/duck"                                                                  with photos/duck/subject.json
    {photos = "photos/duck", instance_prompt = "a photo of a sks duck", class_prompt = "a photo of a duck"}
    {photos = "photos/duck", beside = [{photos = "photos/cat", instance_prompt = "a photo of a zwx cat"}]}

Companions (`beside`) are trained with the subject in the arms that say `together = true`. In every arm their photos
are what confusion is measured against.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.assets import find_asset
from dreambooth_moslora.core.config.files import read_json_table
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import SUBJECT_FILE
from dreambooth_moslora.core.prompts import Subject, subject_of

__all__ = ["StudySubject"]


@dataclass(frozen=True)
class StudySubject:
    """A folder of photos, its prompt and its class prompt (None: prior preservation then needs one in [train]).

    `name` is the folder's. Raises UserError for companions that cannot be told apart from it.
    """

    photos: str
    instance_prompt: str
    class_prompt: str | None = None
    beside: tuple["StudySubject", ...] = ()

    def __post_init__(self) -> None:
        if not self.beside:
            return
        found = (self, *self.beside)
        for one in self.beside:
            if one.beside:
                raise UserError(
                    f"the study's subject {one.photos} stands beside another, so it has no `beside` itself."
                )
        for what, values in (
            ("folder", [os.path.realpath(one.photos) for one in found]),
            ("rare word", [one.subject.token for one in found]),
        ):
            if len(set(values)) < len(values):
                names = " and ".join(one.photos for one in found)
                raise UserError(f"the study's subjects {names}: each needs a {what} of its own beside the other.")

    @property
    def name(self) -> str:
        return Path(self.photos).resolve().name

    @property
    def subject(self) -> Subject:
        """Its token and class word."""
        return subject_of(TrainConfig(instance_prompt=self.instance_prompt, class_prompt=self.class_prompt))

    @property
    def settings(self) -> dict[str, str]:
        """The settings of its training, alone or as one of several `subjects`."""
        found = {"instance_data_dir": self.photos, "instance_prompt": self.instance_prompt}
        return found | ({"class_prompt": self.class_prompt} if self.class_prompt else {})

    @property
    def facts(self) -> dict[str, Any]:
        """What a result depends on. Without companions, what it was before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "beside" or value}

    @classmethod
    def of(cls, entry: str | Mapping[str, Any]) -> "StudySubject":
        """Raises UserError when the folder does not exist or does not name its subject."""
        given = dict(entry) if isinstance(entry, Mapping) else {"photos": entry}
        names = [item.name for item in fields(cls)]
        beside = given.pop("beside", [])
        if not (given.keys() <= set(names) and all(isinstance(text, str) for text in given.values())):
            raise UserError(f"the study's subject {entry!r}: a folder, or a table of texts, {', '.join(names)}.")
        if not isinstance(beside, list):
            raise UserError(f"the study's subject {entry!r}: `beside` is a list of subjects, not {beside!r}.")
        if not given.get("photos"):
            raise UserError(f"the study's subject {entry!r} has no photos: name their folder.")
        folder, companions = Path(find_asset(given["photos"])), tuple(map(cls.of, beside))
        if not folder.is_dir():
            raise UserError(f"the study's subject {folder}: no such folder; paths start at the current directory.")
        if "instance_prompt" in given:
            return cls(str(folder), given["instance_prompt"], given.get("class_prompt"), companions)
        facts_path = folder / SUBJECT_FILE
        if not facts_path.is_file():
            raise UserError(f"the study's subject {folder} has no subject.json: give it an instance_prompt.")
        facts = read_json_table(facts_path)
        token, word = facts.get("token"), facts.get("class_word")
        if not token or not word:
            raise UserError(f"{facts_path} must name the token and the class_word, or the study an instance_prompt.")
        return cls(str(folder), f"a photo of a {token} {word}", f"a photo of a {word}", companions)
