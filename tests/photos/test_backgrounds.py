"""The seam between a subject and its new background."""

from PIL import Image, ImageDraw

from dreambooth_moslora.photos.backgrounds import feathered


def test_the_edge_fades_inside_the_mask_so_that_no_rim_of_the_old_background_stays():
    mask = Image.new("L", (200, 200), 0)
    ImageDraw.Draw(mask).rectangle((50, 50, 149, 149), fill=255)
    edge = feathered(mask)
    outside = [edge.getpixel((x, y)) for x in range(200) for y in range(200) if not mask.getpixel((x, y))]
    assert max(outside) == 0 and edge.getpixel((100, 100)) == 255
    assert any(0 < edge.getpixel((x, 100)) < 255 for x in range(50, 60))
