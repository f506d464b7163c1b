"""From one photo to many: what an editing model is asked for, and which of its pictures are kept.

    shots --the model, beside the photo--> pictures --Sorter--> the folder, or REJECTED in it

A picture is rejected for one of three reasons: it is broken, a near copy, or does not show the
subject. The record (`photos.synthetic`) tells which, and how each picture was made, so that a run
that goes on draws only what is missing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dreambooth_moslora.disk.atomic import rename_with_retry
from dreambooth_moslora.disk.contents import hash_values
from dreambooth_moslora.evaluation.metrics import DinoEncoder
from dreambooth_moslora.evaluation.reference_arms import SAME_SUBJECT_SUFFIX
from dreambooth_moslora.generation.sampling import SampleRequest
from dreambooth_moslora.photos import quality, synthetic
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import open_rgb, require_image, to_rgb
from dreambooth_moslora.pictures import SheetRow, draw_contact_sheet, write_png
from dreambooth_moslora.settings.metric_kinds import MIN_LIKENESS

# Name of a shot -> how its prompt goes on after the subject. Each has a side, a distance, a place
# and a light of its own, so that none of them is learnt with the subject.
SHOTS = {
    "from_the_side": "seen from the side, on grass in the morning sun",
    "from_behind": "seen from behind, on a city street on a cloudy day",
    "close_up": "in a close-up, before a plain light wall",
    "far_away": "far away in a wide view, on a beach",
    "from_above": "seen from above, on a wooden floor",
    "turned_left": "turned to the left, in a kitchen",
    "from_below": "seen from a low angle, before a blue sky",
    "in_snow": "seen from the front, in the snow",
    "turned_right": "turned to the right, in a forest in autumn",
    "in_a_studio": "seen from the side, in a studio with grey background and soft light",
    "at_night": "at night under a street lamp",
    "at_a_window": "beside a window with light from one side",
    "half_turned": "half turned away, in a garden with flowers",
    "on_rocks": "a little away, on rocks at a lake",
    "at_sunset": "seen from the front, in the desert at sunset",
    "in_a_room": "seen from slightly above, on a carpet in a living room",
    "in_rain": "on a wet pavement in the rain",
    "on_a_table": "close, on a table with a white cloth",
    "before_bricks": "seen from the other side, before a brick wall",
    "in_fog": "in a meadow in fog",
}

# Noise is sharper than this by `quality.sharpness`, 3.8 to 4.6; real photos have up to 3.2
MAX_SHARPNESS = 3.5
# Deviation of the brightness, of 0 to 255, below which a picture shows nothing
MIN_CONTRAST = 3.0

# Picture of all that was made, in REJECTED, and the side of its tiles
SHEET_NAME = "sheet.png"
TILE_PX = 192


@dataclass(frozen=True)
class ShotRequest:
    """A picture to draw. `key` changes with all that decides its pixels."""

    name: str  # of its file
    request: SampleRequest
    key: str


def build_shots(class_word: str, count: int, seed: int, **made_from: object) -> list[ShotRequest]:
    """`count` shots of what the word says, in turn, of consecutive seeds. `made_from` is what else
    decides the pixels."""
    found = []
    kinds = list(SHOTS.items())
    for number in range(count):
        kind, words = kinds[number % len(kinds)]
        prompt = f"a photo of a {class_word} {words}{SAME_SUBJECT_SUFFIX.format(class_word)}"
        request = SampleRequest(prompt, seed + number)
        key = hash_values(prompt=prompt, seed=request.seed, **made_from)
        # What is made from something else, as another photo, lies beside it.
        found.append(ShotRequest(f"{kind}_{request.seed}_{key[:6]}.png", request, key))
    return found


def find_fault(image: Image.Image) -> str:
    """What is wrong with the pixels of an RGB picture; "" if nothing is."""
    sharp = quality.measure_sharpness(image)
    if sharp > MAX_SHARPNESS:
        return f"noise, sharpness {sharp:.2f}"
    if np.std(quality.resize_square(image.convert("L"), quality.THUMBNAIL_PX)) < MIN_CONTRAST:
        return "one colour"
    if sharp < quality.MIN_SHARPNESS:
        return f"blurred, sharpness {sharp:.2f}"
    return ""


@dataclass(frozen=True)
class ShotVerdict:
    """Why a picture is rejected, "" if it is kept, and its cosine to the photo."""

    reason: str
    likeness: float

    @property
    def reason_kind(self) -> str:
        """The reason without what was measured."""
        return self.reason.partition(":")[0]


class ShotSorter:
    """Judges pictures beside a photo and those that are kept already.

    encoder: compares subjects
    photo: RGB, shows the subject
    min_likeness: DINO cosine to the photo that is asked for
    """

    def __init__(
        self, encoder: DinoEncoder, photo: Image.Image, min_likeness: float = MIN_LIKENESS
    ) -> None:
        self.encoder = encoder
        self.min_likeness = min_likeness
        self.photo_embedding = encoder.embed_dino_images([photo])[0]
        self.thumbnails: dict[str, np.ndarray] = {}
        self.add_reference("the photo", photo)

    def add_reference(self, name: str, picture: Image.Image) -> None:
        """No later picture may be a copy of this one."""
        self.thumbnails[name] = quality.compute_thumbnail(picture)

    def evaluate_image(self, picture: Image.Image) -> ShotVerdict:
        """Whether to keep an RGB picture."""
        likeness = float(self.encoder.embed_dino_images([picture])[0] @ self.photo_embedding)
        if fault := find_fault(picture):
            reason = f"broken: {fault}"
        elif name := self.find_copied(picture):
            reason = f"near copy: of {name}"
        elif likeness < self.min_likeness:
            reason = f"not the subject: likeness {likeness:.2f}, below {self.min_likeness:g}"
        else:
            reason = ""
        return ShotVerdict(reason, round(likeness, 4))

    def find_copied(self, picture: Image.Image) -> str:
        """Which of the kept pictures this one is nearly equal to, also mirrored; "" if none."""
        own = [
            quality.compute_thumbnail(picture),
            quality.compute_thumbnail(ImageOps.mirror(picture)),
        ]
        for name, other in self.thumbnails.items():
            if max(float(one @ other) for one in own) > quality.MAX_LIKENESS:
                return name
        return ""


@dataclass
class Enlargement:
    """A folder that gets photos.

    folder: with the photo, and perhaps others
    sorter: decides which are kept
    base, licence: of the model that draws, for the record
    """

    folder: Path
    sorter: ShotSorter
    base: str
    licence: str

    def __post_init__(self) -> None:
        (self.folder / synthetic.REJECTED_NAME).mkdir(exist_ok=True)
        self.record = synthetic.read_record(self.folder)

    def find_path(self, name: str) -> Path | None:
        """Where a picture lies: in the folder or in REJECTED; None if in neither."""
        places = (self.folder / name, self.folder / synthetic.REJECTED_NAME / name)
        return next((path for path in places if path.is_file()), None)

    def is_up_to_date(self, shot: ShotRequest) -> bool:
        """Whether the picture is there, and was made from the same."""
        known = self.record.get(shot.name)
        return (
            known is not None and known["made_from"] == shot.key and bool(self.find_path(shot.name))
        )

    def generate_missing(
        self,
        shots: Sequence[ShotRequest],
        draw: Callable[[Sequence[ShotRequest]], Iterator[Image.Image]],
    ) -> Iterator[ShotRequest]:
        """Draw what is missing, and sort all. Yields each shot when its picture lies in its place.
        `draw` gives the pictures of shots, in their order."""
        # Photos that are no shots are no candidates, but may be copied.
        names = {shot.name for shot in shots}
        for photo in find_photos(self.folder, "", quality.MIN_SHARPNESS_PX).photos:
            if photo.path.name not in names:
                self.sorter.add_reference(photo.path.name, open_rgb(photo))

        missing = [shot for shot in shots if not self.is_up_to_date(shot)]
        drawn = draw(missing) if missing else iter(())
        for shot in shots:
            if shot in missing:
                self.sort_image(shot, next(drawn).convert("RGB"), is_new=True)
            else:
                self.sort_image(
                    shot, to_rgb(require_image(self.find_path(shot.name))), is_new=False
                )
            yield shot

    def sort_image(self, shot: ShotRequest, picture: Image.Image, *, is_new: bool) -> None:
        """Judge a picture, note it, and put it into its place. One that a person has moved stays
        there."""
        home = self.folder / shot.name
        other = self.folder / synthetic.REJECTED_NAME / shot.name
        is_moved = not is_new and home.is_file() == bool(self.record[shot.name]["rejected"])
        if not is_moved:
            verdict = self.sorter.evaluate_image(picture)
            self.record[shot.name] = synthetic.SyntheticRecord(
                base=self.base,
                licence=self.licence,
                prompt=shot.request.prompt,
                seed=shot.request.seed,
                made_from=shot.key,
                likeness=verdict.likeness,
                rejected=verdict.reason,
            )
            # The record comes first: no picture lies among the photos without it.
            synthetic.write_record(self.folder, self.record)
            target, before = (other, home) if verdict.reason else (home, other)
            if is_new:
                write_png(target, picture)
            elif not target.is_file():
                rename_with_retry(before, target)
            before.unlink(missing_ok=True)
        if home.is_file():
            self.sorter.add_reference(shot.name, picture)

    def collect_outcomes(self, shots: Sequence[ShotRequest]) -> dict[str, list[ShotRequest]]:
        """The shots by what became of them: "kept" first, then each reason."""
        found: dict[str, list[ShotRequest]] = {"kept": []}
        for shot in shots:
            kind = ShotVerdict(self.record[shot.name]["rejected"], 0).reason_kind or "moved"
            if (self.folder / shot.name).is_file():
                kind = "kept"
            found.setdefault(kind, []).append(shot)
        return found

    def draw_sheet(self, shots: Sequence[ShotRequest]) -> Path:
        """A picture of all shots, by what became of them. Returns its path."""
        rows = []
        for kind, some in self.collect_outcomes(shots).items():
            pictures = []
            for shot in some:
                picture = require_image(self.find_path(shot.name))
                picture.thumbnail((TILE_PX, TILE_PX))
                pictures.append(picture)
            rows.append(SheetRow(kind, pictures, tuple(shot.name for shot in some)))
        path = self.folder / synthetic.REJECTED_NAME / SHEET_NAME
        draw_contact_sheet(rows, path, TILE_PX)
        return path
