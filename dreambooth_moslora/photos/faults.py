"""What can be wrong with a photo, so that it should be left out: one row each.

The words of a photo's reason begin with the row's name, by which it is known again.
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


def reason(name: str, /, **found: object) -> str:
    """A fault of the table with what was found, as a photo's reason."""
    return name + FAULTS[name].sentence.format_map(found)


def faults_of(photo: Photo) -> list[str]:
    """Those of its reasons that are faults. Others tell what was done, such as turning it."""
    return [words for words in photo.reasons if words.startswith(tuple(FAULTS))]


def is_lesser(photo: Photo) -> bool:
    """Whether it has a fault that makes it the duplicate of two equal photos."""
    lesser = tuple(name for name, fault in FAULTS.items() if fault.is_lesser)
    return any(words.startswith(lesser) for words in photo.reasons)
