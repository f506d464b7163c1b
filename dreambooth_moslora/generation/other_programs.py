"""What other programs write into a picture: A1111's text in PNG chunks or EXIF, and ComfyUI's graph. It is only read,
and pixels are never decoded."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import UnidentifiedImageError

from dreambooth_moslora.core import UserError

EXIF_IFD, USER_COMMENT, MAKE, MODEL = 0x8769, 0x9286, 0x010F, 0x0110
MAX_EXIF_BYTES = 4 * 1024**2
ENCODINGS = {b"ASCII\0\0\0": ("utf-8",), b"UNICODE\0": ("utf-16-be", "utf-16-le"), b"\0" * 8: ("utf-8",)}
"""Of EXIF's UserComment, by its first eight bytes. The order of UTF-16's bytes is not said: the first that gives the
word "Steps:" is taken."""
SAMPLERS = {"euler": "Euler", "euler_ancestral": "Euler a", "dpmpp_2m": "DPM++ 2M", "uni_pc": "UniPC"}
"""ComfyUI's name -> A1111's."""
MAX_NODES = 64  # On the way from the sampler to its model, or to a text


def texts_in(path: Path) -> dict[str, str]:
    """Name -> text of a PNG's chunks; of a JPEG or WebP `parameters` (A1111's) and `prompt` (ComfyUI's), if they are
    there. Raises UserError for any other file, and for a damaged one."""
    try:
        with path.open("rb") as file:
            is_webp = (start := file.read(12))[:4] == b"RIFF" and start[8:] == b"WEBP"
        if is_webp:  # Pillow would make room for all pixels
            return texts_in_exif(exif_of_webp(path))
        with PIL.Image.open(path, formats=["PNG", "JPEG"]) as image:
            if image.format == "PNG":
                return {key: value for key, value in image.info.items() if isinstance(value, str)}
            return texts_in_exif(image.info.get("exif", b""))
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{path.name} claims far too many pixels; it is not opened") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path.name} is not a readable PNG, JPEG or WebP file") from error


def exif_of_webp(path: Path) -> bytes:
    """The content of its EXIF chunk; empty without one."""
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"EXIF":
                return file.read(min(size, MAX_EXIF_BYTES))
            file.seek(size + size % 2, 1)
    return b""


def texts_in_exif(content: bytes) -> dict[str, str]:
    """Raises UserError for EXIF that is damaged."""
    exif = PIL.Image.Exif()
    try:
        exif.load(content)
        comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
        words = [exif.get(tag) for tag in (MAKE, MODEL)]
    except Exception as error:  # Pillow's readers of hostile EXIF raise errors of all kinds
        raise UserError("the EXIF of the picture is damaged") from error
    found = {"parameters": comment_text(comment)} if isinstance(comment, bytes | str) and comment else {}
    named = [word.partition(":") for word in words if isinstance(word, str)]
    return found | {name: text for name, colon, text in named if colon and name in ("prompt", "workflow")}


def comment_text(comment: bytes | str) -> str:
    """The text of an EXIF comment; "" for an encoding that is not known."""
    if isinstance(comment, str):
        return comment
    texts = [comment[8:].decode(name, "replace") for name in ENCODINGS.get(comment[:8], ())]
    return next((text for text in texts if "Steps:" in text), texts[0] if texts else "").rstrip("\0")


def values_of_graph(text: str) -> dict[str, Any]:
    """What ComfyUI's graph says of the picture, in the words of A1111's line of settings, with `prompt`, `negative` and
    `loras`. Raises UserError for a graph without a sampler, or a damaged one."""
    try:
        graph = json.loads(text)
        inputs = [node["inputs"] for node in graph.values() if isinstance(node.get("inputs"), dict)]
        sampler = next(one for one in inputs if one.keys() >= {"seed", "cfg", "positive"})
        return dict(values_of_sampler(graph, sampler))
    except StopIteration:
        raise UserError("the picture's graph has no sampler that is known, so its settings cannot be read") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError("the graph inside the picture is damaged") from error


def values_of_sampler(graph: Mapping[str, Any], sampler: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "prompt", text_at(graph, sampler.get("positive"))
    yield "negative", text_at(graph, sampler.get("negative"))
    yield "loras", tuple(loras_before(graph, sampler.get("model")))
    for name, key in (("Seed", "seed"), ("Steps", "steps"), ("CFG scale", "cfg")):
        if not isinstance(sampler.get(key), list):  # else it comes from another node
            yield name, str(sampler[key])
    name, schedule = str(sampler.get("sampler_name", "")), str(sampler.get("scheduler", "normal"))
    yield "Sampler", SAMPLERS.get(name, name)
    yield "Schedule type", "" if schedule == "normal" else schedule.capitalize()
    size = node_at(graph, sampler.get("latent_image"))
    if isinstance(size.get("width"), int) and isinstance(size.get("height"), int):
        yield "Size", f"{size['width']}x{size['height']}"


def node_at(graph: Mapping[str, Any], link: Any) -> Mapping[str, Any]:
    """The inputs of the node that a link ["number", output] names; {} for none."""
    node = graph.get(str(link[0])) if isinstance(link, list) and link else None
    return node["inputs"] if node else {}


def text_at(graph: Mapping[str, Any], link: Any) -> str:
    """The text of the encoder that a link names, which may be a link itself; "" for none."""
    for _ in range(MAX_NODES):
        found = node_at(graph, link)
        link = next((found[key] for key in ("text", "text_g", "string", "value") if key in found), "")
        if isinstance(link, str):
            return link
    return ""


def loras_before(graph: Mapping[str, Any], link: Any) -> Iterator[tuple[str, float]]:
    """(name, strength) of the LoRA loaders on the way to the model."""
    for _ in range(MAX_NODES):
        found = node_at(graph, link)
        with suppress(KeyError):
            yield Path(found["lora_name"].replace("\\", "/")).stem, float(found["strength_model"])
        link = found.get("model")
