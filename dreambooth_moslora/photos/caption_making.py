"""Captions made by a `Captioner` for photos that have none. What the user wrote is never changed.

beside the photos    `dog.txt`, as a user would write it (the command `caption`). `.made_captions.json` lists
                     the made ones; a caption that was edited since counts as the user's
in a run folder      `captions.json` (`--captions auto`). It records the photo, model and words of each
                     caption, so that a resumed run does not make it again

Both files: {"dog.jpg": {"caption": "a photo of a sks dog on the beach", "made_from": key}}.
"""

import errno
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.core.prompts import joined
from dreambooth_moslora.photos.captioners import Captioner
from dreambooth_moslora.photos.photo import Photo, open_rgb
from dreambooth_moslora.photos.sidecars import CAPTION_SUFFIX, MADE_CAPTIONS, kept_captions

__all__ = ["MadeCaption", "keep", "make_beside", "make_for_run"]


@dataclass(frozen=True)
class MadeCaption:
    """The result for one photo: its new `caption`, or None and the reason as a `remark`. With a `key` it is not kept
    yet."""

    photo: Photo
    caption: str | None
    remark: str = ""
    key: str = ""


def make_beside(
    photos: Iterable[Photo], captioner: Captioner, prompt: str, *, anew: bool = False
) -> Iterator[MadeCaption]:
    """Write `name.txt` beside each photo without a caption: `prompt` and the surroundings. Raises OSError.

    With `anew`, earlier made captions that were not edited are made again.
    """
    photos = list(photos)
    named = Counter(photo.path.stem for photo in photos)
    for photo in photos:
        target = photo.path.with_suffix(CAPTION_SUFFIX)
        is_old = was_made(photo, target)
        if is_old and not anew:
            yield MadeCaption(photo, None, "it has a made caption, which is kept (--overwrite_made replaces it)")
        elif not is_old and photo.is_captioned:
            yield MadeCaption(photo, None, "it has a caption, which is kept")
        elif not is_old and target.exists():
            yield MadeCaption(photo, None, f"{target.name} exists but cannot be used; it is kept")
        elif named[photo.path.stem] > 1:
            yield MadeCaption(photo, None, f"another photo has the name {photo.path.stem} too: rename one of them")
        else:
            yield make_one_beside(photo, target, captioner, prompt)


def was_made(photo: Photo, target: Path) -> bool:
    """Whether the file still holds the caption that was made."""
    made = kept_captions(target.with_name(MADE_CAPTIONS)).get(photo.path.name)
    try:
        return made is not None and target.read_text(encoding="utf-8").strip() == made["caption"]
    except (OSError, UnicodeDecodeError):
        return False


def make_one_beside(photo: Photo, target: Path, captioner: Captioner, prompt: str) -> MadeCaption:
    made = make(photo, captioner, prompt)
    if made.caption is not None:
        note(target.with_name(MADE_CAPTIONS), photo, made.caption, key_of(photo, captioner, prompt))
        try:
            atomic_write(target, f"{made.caption}\n")
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return MadeCaption(photo, None, "its name is too long for a caption beside it: rename it")
    return made


def make_for_run(photos: Iterable[Photo], captioner: Captioner, prompt: str, path: Path) -> Iterator[MadeCaption]:
    """Captions that `keep` writes into the file `path`. A caption there of the same photo, model and words is taken."""
    for photo in photos:
        key, old = key_of(photo, captioner, prompt), kept_captions(path).get(photo.kept_name)
        if old and old["made_from"] == key:
            yield MadeCaption(photo, old["caption"])
        else:
            yield replace(make(photo, captioner, prompt), key=key)


def keep(path: Path, made: MadeCaption, prompt: str) -> None:
    """Write a new caption into the file; the `prompt` where there is none."""
    if made.key:
        note(path, made.photo, made.caption or prompt, made.key)


def key_of(photo: Photo, captioner: Captioner, prompt: str) -> str:
    return content_key(photo=file_digest(photo.path), model=captioner.name, word=captioner.word, prompt=prompt)


def make(photo: Photo, captioner: Captioner, prompt: str) -> MadeCaption:
    found = captioner.surroundings(open_rgb(photo))
    if not found:
        return MadeCaption(photo, None, "the model says nothing, so no caption is written")
    return MadeCaption(photo, joined(prompt, found))


def note(path: Path, photo: Photo, caption: str, key: str) -> None:
    """Add one photo's caption to those in the file."""
    known = kept_captions(path) | {photo.kept_name: {"caption": caption, "made_from": key}}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False))
