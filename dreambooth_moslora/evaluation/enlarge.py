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

from dreambooth_moslora.disk.atomic import rename
from dreambooth_moslora.disk.contents import content_key
from dreambooth_moslora.evaluation.metrics import DinoEncoder
from dreambooth_moslora.evaluation.reference_arms import SAME
from dreambooth_moslora.generation.sampling import SampleRequest
from dreambooth_moslora.photos import quality, synthetic
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import open_again, open_rgb, to_rgb
from dreambooth_moslora.pictures import Row, draw_contact_sheet, write_png
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
SHEET = "sheet.png"
TILE_PX = 192


@dataclass(frozen=True)
class Shot:
    """A picture to draw. `key` changes with all that decides its pixels."""

    name: str  # of its file
    request: SampleRequest
    key: str


def shots_of(word: str, count: int, seed: int, **made_from: object) -> list[Shot]:
    """`count` shots of what the word says, in turn, of consecutive seeds. `made_from` is what else
    decides the pixels."""
    found = []
    kinds = list(SHOTS.items())
    for number in range(count):
        kind, words = kinds[number % len(kinds)]
        prompt = f"a photo of a {word} {words}{SAME.format(word)}"
        request = SampleRequest(prompt, seed + number)
        key = content_key(prompt=prompt, seed=request.seed, **made_from)
        # What is made from something else, as another photo, lies beside it.
        found.append(Shot(f"{kind}_{request.seed}_{key[:6]}.png", request, key))
    return found


def broken(picture: Image.Image) -> str:
    """What is wrong with the pixels of an RGB picture; "" if nothing is."""
    sharp = quality.sharpness(picture)
    if sharp > MAX_SHARPNESS:
        return f"noise, sharpness {sharp:.2f}"
    if np.std(quality.shrunk(picture.convert("L"), quality.THUMBNAIL_PX)) < MIN_CONTRAST:
        return "one colour"
    if sharp < quality.MIN_SHARPNESS:
        return f"blurred, sharpness {sharp:.2f}"
    return ""


@dataclass(frozen=True)
class Verdict:
    """Why a picture is rejected, "" if it is kept, and its cosine to the photo."""

    reason: str
    likeness: float

    @property
    def kind(self) -> str:
        """The reason without what was measured."""
        return self.reason.partition(":")[0]


class Sorter:
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
        self.vector = encoder.dino_images([photo])[0]
        self.kept: dict[str, np.ndarray] = {}
        self.keep("the photo", photo)

    def keep(self, name: str, picture: Image.Image) -> None:
        """No later picture may be a copy of this one."""
        self.kept[name] = quality.thumbnail(picture)

    def judge(self, picture: Image.Image) -> Verdict:
        """Whether to keep an RGB picture."""
        likeness = float(self.encoder.dino_images([picture])[0] @ self.vector)
        if fault := broken(picture):
            reason = f"broken: {fault}"
        elif name := self.copied(picture):
            reason = f"near copy: of {name}"
        elif likeness < self.min_likeness:
            reason = f"not the subject: likeness {likeness:.2f}, below {self.min_likeness:g}"
        else:
            reason = ""
        return Verdict(reason, round(likeness, 4))

    def copied(self, picture: Image.Image) -> str:
        """Which of the kept pictures this one is nearly equal to, also mirrored; "" if none."""
        own = [quality.thumbnail(picture), quality.thumbnail(ImageOps.mirror(picture))]
        for name, other in self.kept.items():
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
    sorter: Sorter
    base: str
    licence: str

    def __post_init__(self) -> None:
        (self.folder / synthetic.REJECTED).mkdir(exist_ok=True)
        self.record = synthetic.read_record(self.folder)

    def place(self, name: str) -> Path | None:
        """Where a picture lies: in the folder or in REJECTED; None if in neither."""
        places = (self.folder / name, self.folder / synthetic.REJECTED / name)
        return next((path for path in places if path.is_file()), None)

    def is_made(self, shot: Shot) -> bool:
        """Whether the picture is there, and was made from the same."""
        known = self.record.get(shot.name)
        return known is not None and known["made_from"] == shot.key and bool(self.place(shot.name))

    def fill(
        self, shots: Sequence[Shot], draw: Callable[[Sequence[Shot]], Iterator[Image.Image]]
    ) -> Iterator[Shot]:
        """Draw what is missing, and sort all. Yields each shot when its picture lies in its place.
        `draw` gives the pictures of shots, in their order."""
        # Photos that are no shots are no candidates, but may be copied.
        names = {shot.name for shot in shots}
        for photo in find_photos(self.folder, "", quality.MIN_LOOK_PX).photos:
            if photo.path.name not in names:
                self.sorter.keep(photo.path.name, open_rgb(photo))

        missing = [shot for shot in shots if not self.is_made(shot)]
        drawn = draw(missing) if missing else iter(())
        for shot in shots:
            if shot in missing:
                self.settle(shot, next(drawn).convert("RGB"), is_new=True)
            else:
                self.settle(shot, to_rgb(open_again(self.place(shot.name))), is_new=False)
            yield shot

    def settle(self, shot: Shot, picture: Image.Image, *, is_new: bool) -> None:
        """Judge a picture, note it, and put it into its place. One that a person has moved stays
        there."""
        home = self.folder / shot.name
        other = self.folder / synthetic.REJECTED / shot.name
        is_moved = not is_new and home.is_file() == bool(self.record[shot.name]["rejected"])
        if not is_moved:
            verdict = self.sorter.judge(picture)
            self.record[shot.name] = synthetic.Made(
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
                rename(before, target)
            before.unlink(missing_ok=True)
        if home.is_file():
            self.sorter.keep(shot.name, picture)

    def rows(self, shots: Sequence[Shot]) -> dict[str, list[Shot]]:
        """The shots by what became of them: "kept" first, then each reason."""
        found: dict[str, list[Shot]] = {"kept": []}
        for shot in shots:
            kind = Verdict(self.record[shot.name]["rejected"], 0).kind or "moved"
            if (self.folder / shot.name).is_file():
                kind = "kept"
            found.setdefault(kind, []).append(shot)
        return found

    def draw_sheet(self, shots: Sequence[Shot]) -> Path:
        """A picture of all shots, by what became of them. Returns its path."""
        rows = []
        for kind, some in self.rows(shots).items():
            pictures = []
            for shot in some:
                picture = open_again(self.place(shot.name))
                picture.thumbnail((TILE_PX, TILE_PX))
                pictures.append(picture)
            rows.append(Row(kind, pictures, tuple(shot.name for shot in some)))
        path = self.folder / synthetic.REJECTED / SHEET
        draw_contact_sheet(rows, path, TILE_PX)
        return path
