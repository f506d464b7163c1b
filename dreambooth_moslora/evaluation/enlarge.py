"""From one photo to many: prompts for an editing model, and the choice among its images.

    shots --the model, with the photo--> images --ShotSorter--> the folder, or REJECTED in it

An image is rejected for one of three reasons: it is broken, a near copy, or does not show the
subject. The record (`photos.synthetic`) says which, and how each image was made, so that a resumed
run generates only what is missing.
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
"""Name of a shot -> end of its prompt, after the subject.

Each has its own side, distance, place and light, so that none of them is learnt with the subject.
"""
MAX_SHARPNESS = 3.5
"""Limit of `quality.measure_sharpness`: noise has 3.8 to 4.6, real photos at most 3.2."""
MIN_CONTRAST = 3.0
"""Deviation of the brightness, of 0 to 255, below which an image shows nothing."""
SHEET_NAME = "sheet.png"
TILE_PX = 192
"""Contact sheet of all generated images, and the side of its tiles."""


@dataclass(frozen=True)
class ShotRequest:
    """Image to generate. `key` changes with everything that decides its pixels."""

    name: str  # of its file
    request: SampleRequest
    key: str


def build_shots(class_word: str, count: int, seed: int, **made_from: object) -> list[ShotRequest]:
    """Return `count` shots of the subject, in turn, of consecutive seeds.

    made_from: what else decides the pixels
    """
    shots = []
    kinds = list(SHOTS.items())
    for number in range(count):
        name, prompt_end = kinds[number % len(kinds)]
        prompt = f"a photo of a {class_word} {prompt_end}{SAME_SUBJECT_SUFFIX.format(class_word)}"
        request = SampleRequest(prompt, seed + number)
        key = hash_values(prompt=prompt, seed=request.seed, **made_from)
        # Shots of another photo have other names.
        shots.append(ShotRequest(f"{name}_{request.seed}_{key[:6]}.png", request, key))
    return shots


def find_fault(image: Image.Image) -> str:
    """Return the fault in the pixels of an RGB image; "" if there is none."""
    sharpness = quality.measure_sharpness(image)
    if sharpness > MAX_SHARPNESS:
        return f"noise, sharpness {sharpness:.2f}"
    if np.std(quality.resize_square(image.convert("L"), quality.THUMBNAIL_PX)) < MIN_CONTRAST:
        return "one colour"
    if sharpness < quality.MIN_SHARPNESS:
        return f"blurred, sharpness {sharpness:.2f}"
    return ""


@dataclass(frozen=True)
class ShotVerdict:
    """Reason why an image is rejected, "" if it is accepted, and its DINO cosine to the photo."""

    reason: str
    likeness: float

    @property
    def reason_kind(self) -> str:
        """Reason without the measured value."""
        return self.reason.partition(":")[0]


class ShotSorter:
    """Judge of generated images, beside a photo and the images that are already accepted.

    encoder: compares subjects
    photo: RGB, shows the subject
    min_likeness: required DINO cosine to the photo
    """

    def __init__(
        self, encoder: DinoEncoder, photo: Image.Image, min_likeness: float = MIN_LIKENESS
    ) -> None:
        self.encoder = encoder
        self.min_likeness = min_likeness
        self.photo_embedding = encoder.embed_dino_images([photo])[0]
        self.thumbnails: dict[str, np.ndarray] = {}
        self.add_reference("the photo", photo)

    def add_reference(self, name: str, image: Image.Image) -> None:
        """Reject later images that are copies of this one."""
        self.thumbnails[name] = quality.compute_thumbnail(image)

    def evaluate_image(self, image: Image.Image) -> ShotVerdict:
        """Return whether to accept an RGB image, and why not."""
        likeness = float(self.encoder.embed_dino_images([image])[0] @ self.photo_embedding)
        if fault := find_fault(image):
            reason = f"broken: {fault}"
        elif name := self.find_copied(image):
            reason = f"near copy: of {name}"
        elif likeness < self.min_likeness:
            reason = f"not the subject: likeness {likeness:.2f}, below {self.min_likeness:g}"
        else:
            reason = ""
        return ShotVerdict(reason, round(likeness, 4))

    def find_copied(self, image: Image.Image) -> str:
        """Return the name of an accepted image that this one is nearly equal to, also mirrored; ""
        if none."""
        sides = [quality.compute_thumbnail(side) for side in (image, ImageOps.mirror(image))]
        for name, reference in self.thumbnails.items():
            if max(float(side @ reference) for side in sides) > quality.MAX_LIKENESS:
                return name
        return ""


@dataclass
class Enlargement:
    """Folder that gets generated photos.

    folder: with the photo, and perhaps others
    sorter: decides which are accepted
    base, licence: of the model that generates, for the record
    """

    folder: Path
    sorter: ShotSorter
    base: str
    licence: str

    def __post_init__(self) -> None:
        (self.folder / synthetic.REJECTED_NAME).mkdir(exist_ok=True)
        self.record = synthetic.read_record(self.folder)

    def find_path(self, name: str) -> Path | None:
        """Return the path of an image, in the folder or in REJECTED; None if in neither."""
        paths = (self.folder / name, self.folder / synthetic.REJECTED_NAME / name)
        return next((path for path in paths if path.is_file()), None)

    def is_up_to_date(self, shot: ShotRequest) -> bool:
        """Return whether the image exists, and was made from the same inputs."""
        entry = self.record.get(shot.name, {})
        return entry.get("made_from") == shot.key and self.find_path(shot.name) is not None

    def generate_missing(
        self,
        shots: Sequence[ShotRequest],
        generate: Callable[[Sequence[ShotRequest]], Iterator[Image.Image]],
    ) -> Iterator[ShotRequest]:
        """Generate the missing images and sort all; yield each shot when its image is sorted.

        generate: generates the images of shots, in their order
        """
        # Other photos of the folder are not candidates, but must not be copied.
        names = {shot.name for shot in shots}
        for photo in find_photos(self.folder, "", quality.MIN_SHARPNESS_PX).photos:
            if photo.path.name not in names:
                self.sorter.add_reference(photo.path.name, open_rgb(photo))

        missing = [shot for shot in shots if not self.is_up_to_date(shot)]
        images = generate(missing) if missing else iter(())
        for shot in shots:
            if shot in missing:
                self.sort_image(shot, next(images).convert("RGB"), is_new=True)
            else:
                image = to_rgb(require_image(self.find_path(shot.name)))
                self.sort_image(shot, image, is_new=False)
            yield shot

    def sort_image(self, shot: ShotRequest, image: Image.Image, *, is_new: bool) -> None:
        """Judge an image, record the verdict, and move the image to its folder.

        An image that a person has moved stays where it is.
        """
        accepted_path = self.folder / shot.name
        rejected_path = self.folder / synthetic.REJECTED_NAME / shot.name
        is_moved = not is_new and accepted_path.is_file() == bool(
            self.record[shot.name]["rejected"]
        )
        if not is_moved:
            verdict = self.sorter.evaluate_image(image)
            self.record[shot.name] = synthetic.SyntheticRecord(
                base=self.base,
                licence=self.licence,
                prompt=shot.request.prompt,
                seed=shot.request.seed,
                made_from=shot.key,
                likeness=verdict.likeness,
                rejected=verdict.reason,
            )
            # Write the record first: no image may lie among the photos without it.
            synthetic.write_record(self.folder, self.record)

            # Its folder by the verdict; an earlier verdict may have put it into the other one.
            target, old_path = (
                (rejected_path, accepted_path) if verdict.reason else (accepted_path, rejected_path)
            )
            if is_new:
                write_png(target, image)
            elif not target.is_file():
                rename_with_retry(old_path, target)
            old_path.unlink(missing_ok=True)

        # Later images must not be copies of it.
        if accepted_path.is_file():
            self.sorter.add_reference(shot.name, image)

    def collect_outcomes(self, shots: Sequence[ShotRequest]) -> dict[str, list[ShotRequest]]:
        """Return the shots by outcome: "kept" first, then each reason."""
        outcomes: dict[str, list[ShotRequest]] = {"kept": []}
        for shot in shots:
            kind = ShotVerdict(self.record[shot.name]["rejected"], 0).reason_kind or "moved"
            if (self.folder / shot.name).is_file():
                kind = "kept"
            outcomes.setdefault(kind, []).append(shot)
        return outcomes

    def draw_sheet(self, shots: Sequence[ShotRequest]) -> Path:
        """Draw a contact sheet of all shots by outcome, and return its path."""
        rows = []
        for kind, kind_shots in self.collect_outcomes(shots).items():
            images = []
            for shot in kind_shots:
                image = require_image(self.find_path(shot.name))
                image.thumbnail((TILE_PX, TILE_PX))
                images.append(image)
            rows.append(SheetRow(kind, images, tuple(shot.name for shot in kind_shots)))
        path = self.folder / synthetic.REJECTED_NAME / SHEET_NAME
        draw_contact_sheet(rows, path, TILE_PX)
        return path
