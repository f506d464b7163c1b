"""What can be wrong with a photo, so that it should be left out: one row each.

Of a photo's reasons those that are a `Reason` are its faults. The others are mild: they tell what
was done, such as turning it.
"""

from dataclasses import dataclass

from dreambooth_moslora.photos.photo_file import Photo


@dataclass(frozen=True)
class Fault:
    """One fault.

    sentence: how the reason goes on after the name, with the values that were found in braces
    is_lesser: whether of two equal photos the one with it is the duplicate
    """

    sentence: str
    is_lesser: bool = False


FAULTS = {
    "blurred": Fault(
        sentence=": sharpness {sharpness:.2f}, sharp photos have {usual} and more",
        is_lesser=True,
    ),
    "too dark": Fault(
        sentence=": nothing in it is brighter than {brightest:.0%}",
        is_lesser=True,
    ),
    "overexposed": Fault(
        sentence=": {white:.0%} of it is pure white",
        is_lesser=True,
    ),
    "near-duplicate": Fault(sentence=" of {name}"),
    "too small": Fault(
        sentence=" for the resolution: {width} x {height} px is enlarged {times:.1f} times"
    ),
}


class Reason(str):
    """The words of a fault that a photo has; `fault` is the name of its row."""

    fault: str


def reason(name: str, /, **found: object) -> Reason:
    """A fault of the table with what was found, as a photo's reason."""
    words = Reason(name + FAULTS[name].sentence.format_map(found))
    words.fault = name
    return words


def faults_of(photo: Photo) -> list[Reason]:
    """Those of its reasons that are faults."""
    return [words for words in photo.reasons if isinstance(words, Reason)]


def is_lesser(photo: Photo) -> bool:
    """Whether it has a fault that makes it the duplicate of two equal photos."""
    return any(FAULTS[words.fault].is_lesser for words in faults_of(photo))
