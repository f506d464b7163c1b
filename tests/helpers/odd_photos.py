"""A folder of good, odd and broken photo files, each made here, with the verdict it must get."""

import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw

SIZE_PX = (96, 128)
QUADRANTS = {
    (0, 0): (220, 30, 30),
    (0, 1): (30, 200, 40),
    (1, 0): (40, 60, 220),
    (1, 1): (240, 220, 60),
}


@dataclass(frozen=True)
class Case:
    """`says`: a part of the reason, None for none. `size_px` (h, w) upright, None when it cannot be
    known."""

    name: str
    write: Callable[[Path], object]
    usable: bool = True
    says: str | None = None
    size_px: tuple[int, int] | None = SIZE_PX
    colours: bool = True


def picture(mode: str = "RGB", size_px: tuple[int, int] = SIZE_PX) -> Image.Image:
    """Four coloured quadrants with fine lines in them: what lies where can be told, and it is
    sharp."""
    height, width = size_px
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for (row, column), colour in QUADRANTS.items():
        box = (
            column * width // 2,
            row * height // 2,
            (column + 1) * width // 2 - 1,
            (row + 1) * height // 2 - 1,
        )
        draw.rectangle(box, fill=colour)
    return image if mode == "RGB" else image.convert(mode)


def jpeg(**options) -> bytes:
    buffer = BytesIO()
    picture().save(buffer, "JPEG", quality=95, subsampling=0, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Callable[[Path], object]:
    """A JPEG whose pixels lie as the EXIF orientation says, so that it stands like `picture()`."""
    turns = [
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    ]
    inverse = None if orientation == 1 else Image.Transpose[turns[orientation - 2]]

    def write(path: Path) -> None:
        image = picture() if inverse is None else picture().transpose(inverse)
        image.save(path, quality=95, subsampling=0, exif=orientation_exif(orientation))

    return write


def saved(mode: str = "RGB", **options) -> Callable[[Path], object]:
    return lambda path: picture(mode).save(path, **options)


def heif(path: Path) -> None:
    import pillow_heif

    pillow_heif.from_pillow(picture()).save(path, quality=95)


def heif_with_orientation(path: Path) -> None:
    """HEIF turns pictures by a box of its own; the EXIF orientation that phones write besides must
    not count again."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    picture().save(path, format="HEIF", quality=95, exif=orientation_exif(6))


def avif_turned(path: Path) -> None:
    picture().transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=orientation_exif(6))


def orientation_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def turned_with_damage(path: Path) -> None:
    """An EXIF orientation that can be read, beside a resolution in letters, which Pillow cannot
    write anew."""
    entries = struct.pack("<HHHIHH", 2, 0x0112, 3, 1, 6, 0) + struct.pack(
        "<HHI4s", 0x011A, 2, 4, b"abc"
    )
    exif = b"Exif\0\0II" + struct.pack("<HI", 42, 8) + entries + bytes(4)
    picture().transpose(Image.Transpose.ROTATE_90).save(path, quality=95, subsampling=0, exif=exif)


def lab(path: Path) -> None:
    to_lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(picture(), *to_lab, outputMode="LAB").save(path)


def deep(dtype: type, top: float) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(
        (np.asarray(picture("L"), dtype=np.float64) / 255 * top).astype(dtype)
    ).save(path)


def png_of(
    width: int, height: int, rows: bytes, *chunks: tuple[bytes, bytes], bits: int = 8
) -> bytes:
    """An RGB PNG that says of itself whatever is wanted; `rows` are its pixels, each with a 0
    before it."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    whole = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def deep_rgb_png(path: Path) -> None:
    """A 16-bit RGB PNG, which Pillow cannot write."""
    values = np.asarray(picture(), dtype=">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    path.write_bytes(png_of(SIZE_PX[1], SIZE_PX[0], rows, bits=16))


def transparent(path: Path) -> None:
    image = picture("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 16))
    image.save(path)


def palette_with_hole(path: Path) -> None:
    image = picture().quantize(8)
    image.save(path, transparency=image.getpixel((127, 95)))


def animated(path: Path) -> None:
    picture().save(
        path,
        save_all=True,
        append_images=[Image.new("RGB", (128, 96), "black")],
        duration=100,
        lossless=True,
    )


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


STRAY, BROKEN = "stray", "broken"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CASES = [
    Case("plain.jpg", saved(quality=95)),
    Case("UPPER.JPEG", saved(format="JPEG", quality=95)),
    Case("progressive.jpg", raw(jpeg(progressive=True))),
    Case("plain.png", saved()),
    Case("plain.webp", saved(lossless=True)),
    Case("plain.bmp", saved()),
    Case("plain.tiff", saved(compression="tiff_lzw")),
    Case("plain.gif", lambda p: picture().quantize(8).save(p)),
    Case("plain.avif", saved(quality=95)),
    Case("plain.heic", heif),
    Case("turned.heic", heif_with_orientation),
    Case("turned.avif", avif_turned, says="rotated"),
    *(Case(f"turned_{n}.jpg", turned(n), says="rotated" if n > 1 else None) for n in range(1, 9)),
    Case("grey.jpg", saved("L"), colours=False),
    Case("grey_alpha.png", saved("LA"), colours=False),
    Case("bilevel.png", saved("1"), colours=False),
    Case("palette.png", lambda p: picture().quantize(8).save(p)),
    Case("palette_hole.png", palette_with_hole, says="transparent", colours=False),
    Case("rgba.png", transparent, says="transparent"),
    Case("opaque_rgba.png", saved("RGBA")),
    Case(
        "nothing_but_alpha.png",
        lambda p: Image.new("RGBA", (128, 96)).save(p),
        says="entirely transparent",
        colours=False,
    ),
    Case("cmyk.jpg", saved("CMYK", quality=95)),
    Case("cmyk.tif", saved("CMYK")),
    Case("lab.tif", lab, False, "the mode LAB", None),
    Case("deep_grey.png", deep(np.uint16, 65535), False, "8 bits", None),
    Case("deep_grey.tif", deep(np.uint16, 65535), False, "8 bits", None),
    Case("deep_int.tif", deep(np.int32, 65535), False, "8 bits", None),
    Case("float.tif", deep(np.float32, 1.0), False, "8 bits", None),
    Case("deep_rgb.png", deep_rgb_png),
    Case("profile.png", saved(icc_profile=SRGB)),
    Case("bad_profile.png", saved(icc_profile=b"no profile at all")),
    Case("bad_exif.jpg", raw(jpeg(exif=b"Exif\0\0MM\0*" + b"\xff" * 40))),
    Case("turned_damaged.jpg", turned_with_damage, says="rotated"),
    Case("animated.gif", animated),
    Case("animated.webp", animated),
    Case("jpeg_called_png.png", raw(jpeg())),
    Case("no_suffix", raw(jpeg())),
    Case("photo.jfif", raw(jpeg())),
    Case("name with späce & 雪.jpg", raw(jpeg())),
    Case(
        "small.jpg",
        lambda p: picture(size_px=(40, 60)).save(p),
        says="too small",
        size_px=(40, 60),
        colours=False,
    ),
    Case(
        "long.jpg", lambda p: picture(size_px=(64, 900)).save(p), size_px=(64, 900), colours=False
    ),
    Case("tiny.jpg", lambda p: picture(size_px=(4, 4)).save(p), False, "tiny", (4, 4)),
    Case("one_pixel.png", lambda p: Image.new("RGB", (1, 1)).save(p), False, "tiny", (1, 1)),
    Case("sliver.png", lambda p: Image.new("RGB", (900, 3)).save(p), False, "tiny", (3, 900)),
    Case("enormous.png", raw(png_of(40000, 40000, b"\0" * 1000)), False, "enormous", None),
    Case("empty.jpg", raw(b""), False, BROKEN, None),
    Case("text.jpg", raw(b"this is no picture"), False, BROKEN, None),
    Case("header_only.jpg", raw(jpeg()[:20]), False, BROKEN, None),
    Case("truncated.jpg", raw(jpeg()[:-700]), False, BROKEN, None),
    Case(
        "truncated.png",
        lambda p: (picture().save(p), p.write_bytes(p.read_bytes()[:200])),
        False,
        BROKEN,
        None,
    ),
    Case("zeros.heic", raw(b"\0" * 4096), False, BROKEN, None),
    Case(
        "half.heic", lambda p: (heif(p), p.write_bytes(p.read_bytes()[:-200])), False, BROKEN, None
    ),
    Case(
        "half.avif",
        lambda p: (saved()(p), p.write_bytes(p.read_bytes()[:-100])),
        False,
        BROKEN,
        None,
    ),
    Case("noise.webp", raw(random.Random(1).randbytes(500)), False, BROKEN, None),
    Case(".DS_Store", raw(b"\0\0\0\1Bud1"), False, STRAY, None),
    Case("._plain.jpg", raw(b"\0\5\x16\7"), False, STRAY, None),
    Case("Thumbs.db", raw(b"\xd0\xcf"), False, STRAY, None),
    Case("film.mp4", raw(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"), False, STRAY, None),
    Case("film.mov", raw(b"\0\0\0\x14ftypqt  "), False, STRAY, None),
    Case("orphan.txt", raw(b"a caption of no photo"), False, STRAY, None),
    Case("orphan.mask.png", lambda p: Image.new("L", (8, 8)).save(p), False, STRAY, None),
    Case("page.pdf", raw(b"%PDF-1.4"), False, STRAY, None),
    Case(
        "script.eps",
        raw(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage"),
        False,
        STRAY,
        None,
    ),
    Case("drawing.svg", raw(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), False, STRAY, None),
    Case("folder", lambda p: p.mkdir(), False, STRAY, None),
    Case("folder.jpg", lambda p: p.mkdir(), False, STRAY, None),
    Case("dangling.jpg", lambda p: p.symlink_to("nowhere.jpg"), False, STRAY, None),
    Case("pipe.jpg", os.mkfifo, False, STRAY, None),
]


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for case in CASES:
        case.write(folder / case.name)
    return folder
