"""Contact sheets: places of the tiles, size of the sheet, and text that does not fit."""

from PIL import Image, ImageFont

from dreambooth_moslora.pictures import SheetRow, draw_contact_sheet, wrap_text

TILE_PX = 64
LEFT_PX = 20
"""Border of the sheet."""
STEP_PX = TILE_PX + 8
"""From one tile to the next, with the gap."""
LINE_PX = 11 + 8
"""Line of text with its spacing, in the smallest font."""


def paint_tile(number: int) -> Image.Image:
    return Image.new("RGB", (TILE_PX, TILE_PX), (10 * number, 200, 0))


def test_tiles_stand_in_lines_of_six_below_their_title(tmp_path):
    captioned = SheetRow("end", [paint_tile(20)], ("a dog",))
    rows = [SheetRow("photos", [paint_tile(number) for number in range(8)]), captioned]
    draw_contact_sheet(rows, tmp_path / "sheet.png", TILE_PX)
    sheet = Image.open(tmp_path / "sheet.png")

    # The two rows: a title, lines of tiles, and a gap. Captions have two lines.
    first_px = LINE_PX + 2 * STEP_PX + 8
    second_px = LINE_PX + STEP_PX + 2 * LINE_PX + 8
    assert sheet.size == (2 * LEFT_PX + 6 * STEP_PX - 8, 2 * LEFT_PX + first_px + second_px)

    # Opposite corners of each tile, and the gaps beside it.
    places = {number: divmod(number, 6) for number in range(8)}
    corners = {
        number: (LEFT_PX + column * STEP_PX, LEFT_PX + LINE_PX + line * STEP_PX)
        for number, (line, column) in places.items()
    }
    corners[20] = (LEFT_PX, LEFT_PX + first_px + LINE_PX)
    for number, (x, y) in corners.items():
        last_x, last_y = x + TILE_PX - 1, y + TILE_PX - 1
        assert sheet.getpixel((x, y)) == (10 * number, 200, 0), number
        assert sheet.getpixel((last_x, last_y)) == (10 * number, 200, 0), number
        assert sheet.getpixel((last_x + 1, last_y)) == (255, 255, 255), number
        assert sheet.getpixel((x, y - 1)) == (255, 255, 255), number


def test_sheet_is_as_wide_as_its_longest_row(tmp_path):
    rows = [SheetRow("two", [paint_tile(1)] * 2), SheetRow("one", [paint_tile(2)])]
    draw_contact_sheet(rows, tmp_path / "sheet.png", TILE_PX)
    assert Image.open(tmp_path / "sheet.png").width == 2 * LEFT_PX + 2 * STEP_PX - 8


def test_long_text_has_two_lines_and_an_ellipsis():
    font = ImageFont.load_default(11)
    assert wrap_text("a dog", font, 192) == "a dog"
    lines = wrap_text("a photo of a sks dog on the beach " * 5, font, 192).split("\n")
    assert len(lines) == 2 and lines[1].endswith(" …")
