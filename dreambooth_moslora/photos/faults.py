"""What can be wrong with a photo, so that it should be left out: one row each.

Of a photo's reasons those that are a `Reason` are its faults. The others are mild: they tell what
was done, such as turning it.
"""

from dreambooth_moslora.photos.photo_file import Photo

# Fault -> how its reason goes on after the name, with the values that were found in braces
FAULTS = {
    "blurred": ": sharpness {sharpness:.2f}, sharp photos have {usual} and more",
    "near-duplicate": " of {name}",
    "too small": " for the resolution: {width} x {height} px is enlarged {times:.1f} times",
}


class Reason(str):
    """The words of a fault that a photo has; `fault` is the name of its row."""

    fault: str


def make_reason(name: str, /, **values: object) -> Reason:
    """A fault of the table with what was found, as a photo's reason."""
    words = Reason(name + FAULTS[name].format_map(values))
    words.fault = name
    return words


def list_faults(photo: Photo) -> list[Reason]:
    """Those of its reasons that are faults."""
    return [words for words in photo.reasons if isinstance(words, Reason)]
