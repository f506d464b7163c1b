"""`--new_backgrounds`: the scenes that each photo's subject is pasted onto, and how both become one picture.

    photo, mask, scene  ->  backgrounds/dog.jpg.0.png, with backgrounds/dog.jpg.mask.png as its mask

The mask's edge is feathered inward, so that no rim of the old background stays. A picture's header records its
sources, so that a resumed run does not make it again.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import public_name
from dreambooth_moslora.core.pictures import Row
from dreambooth_moslora.core.prompts import placed, scene_places, scene_prompt
from dreambooth_moslora.core.seeding import place_of, seed_of
from dreambooth_moslora.photos.crops import bucket_of, bucket_step, resized_size
from dreambooth_moslora.photos.folder import framed, photo_report
from dreambooth_moslora.photos.made_pictures import made_from, marked_png
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import Photo, open_rgb

__all__ = [
    "NO_MASKS",
    "NewBackground",
    "background_rows",
    "check_masks",
    "check_new_backgrounds",
    "new_backgrounds",
]

NO_MASKS = "--new_backgrounds needs masks, and no photo has one: give --masks auto, or name.mask.png beside each."
FEATHER = 0.006
"""Radius of the edge's blur, as a fraction of the shorter side."""


@dataclass(frozen=True)
class NewBackground:
    """The subject of `photo` at a `place`. The scene is drawn by `prompt` from `seed` in `scene_px` (h, w).

    The picture, of `size_px` (h, w), is kept at `path`; `caption` says what it shows.
    """

    photo: Photo
    place: str
    prompt: str
    caption: str
    seed: int
    scene_px: tuple[int, int]
    size_px: tuple[int, int]
    path: Path
    key: str

    @property
    def mask_path(self) -> Path:
        """One mask for all new backgrounds of the photo."""
        return self.path.with_name(f"{self.photo.path.name}.mask.png")

    @property
    def is_made(self) -> bool:
        return made_from(self.path) == self.key and self.mask_path.is_file()

    def make(self, scene: Image.Image) -> None:
        """Write the mask, then the picture."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.size_px[::-1]
        mask = open_mask(self.photo).resize(size, Image.Resampling.BOX)
        subject = open_rgb(self.photo).resize(size, Image.Resampling.LANCZOS)
        whole = Image.composite(subject, ImageOps.fit(scene, size), feathered(mask))
        atomic_write(self.mask_path, marked_png(mask, ""))
        atomic_write(self.path, marked_png(whole, self.key))

    def as_photo(self, config: TrainConfig) -> Photo:
        """The picture as a photo of the run."""
        found = Photo(
            self.path, self.size_px, (self.caption,), self.mask_path, is_captioned=True, subject=self.photo.subject
        )
        return Photo(**{**vars(found), "captions": framed(config, found)})


def check_new_backgrounds(config: TrainConfig) -> None:
    """`check_masks` before a run; with `--masks auto` the run makes masks itself. Raises UserError."""
    if config.new_backgrounds and config.masks != "auto":
        check_masks(config, photo_report(config).photos)


def check_masks(config: TrainConfig, photos: Iterable[Photo]) -> None:
    """Raises UserError when new backgrounds are asked for and no photo has a mask."""
    if config.new_backgrounds and all(photo.mask_path is None for photo in photos):
        raise UserError(NO_MASKS)


def feathered(mask: Image.Image) -> Image.Image:
    """The mask (L) with an edge that fades inside it, to 0 where it ends."""
    blurred = mask.filter(ImageFilter.GaussianBlur(FEATHER * min(mask.size)))
    return blurred.point([max(0, 2 * value - 255) for value in range(256)])


def new_backgrounds(config: TrainConfig, photos: Iterable[Photo], folder: Path) -> Iterator[NewBackground]:
    """`config.new_backgrounds` pictures for each photo with a mask; the places take turns."""
    subjects = each_subject(config)
    masked = [photo for photo in photos if photo.mask_path is not None]
    for number, photo in enumerate(masked):
        facts = {"photo": file_digest(photo.path), "mask": file_digest(photo.mask_path)}
        for turn in range(config.new_backgrounds):
            yield new_background(subjects[photo.subject], photo, number * config.new_backgrounds + turn, folder, facts)


def new_background(config: TrainConfig, photo: Photo, number: int, folder: Path, facts: dict) -> NewBackground:
    base, places = config.pretrained_model_name_or_path, scene_places(config)
    place = places[place_of(number, len(places), config.seed, "backgrounds")[1]]
    prompt, seed = scene_prompt(base, place), seed_of(config.seed, "background", number) % 2**32
    scene_px = bucket_of(photo.size_px, config.resolution, bucket_step(config))
    size_px = composed_size(photo.size_px, math.ceil(config.resolution * config.crop_zoom))
    made = {"prompt": prompt, "seed": seed, "base": public_name(base), "sizes": [scene_px, size_px]}
    path = folder / f"{photo.kept_name}.{number % config.new_backgrounds}.png"
    caption = placed(config.instance_prompt, place)
    key = content_key(**facts, **made)
    return NewBackground(photo, place, prompt, caption, seed, scene_px, size_px, path, key)


def composed_size(size_px: tuple[int, int], shortest_px: int) -> tuple[int, int]:
    """(h, w) of the picture: the photo's, but at most `shortest_px` at its shorter side, as crops are not larger."""
    return size_px if min(size_px) <= shortest_px else resized_size(size_px, (shortest_px, shortest_px))


def background_rows(made: Iterable[NewBackground]) -> list[Row]:
    """Rows for a contact sheet: each photo beside its new backgrounds, with captions."""
    rows: dict[Path, Row] = {}
    for one in made:
        path = one.photo.path
        row = rows.get(path) or Row(path.name, [open_rgb(one.photo)], ("the photo",))
        rows[path] = Row(row.title, [*row.images, Image.open(one.path)], (*row.captions, one.caption))
    return list(rows.values())
