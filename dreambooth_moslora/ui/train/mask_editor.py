"""gradio's ImageEditor with only a brush and an eraser, and with limits: uploads are bounded before they are
decoded, and unused ones are dropped."""

import io
from collections import OrderedDict
from typing import Any

import fastapi
import gradio as gr
import PIL.Image

from dreambooth_moslora.ui.train.mask_corrections import EDIT_PX, LEARNED, LEFT_OUT

__all__ = ["mask_editor"]

MOST_PIXELS = 4 * EDIT_PX**2
KEPT_BYTES = 32 * 1024**2
"""Limit for all visitors' drawings between upload and the click that uses them."""
BRUSH_PX, OPACITY = 24, 0.6
TOO_LARGE = "the painted mask is no picture of the size that was shown"


class Drawings(OrderedDict):
    """Id -> uploaded drawing; the oldest are dropped when the total exceeds KEPT_BYTES."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > 1 and sum(map(bytes_of, self.values())) > KEPT_BYTES:
            self.popitem(last=False)


def bytes_of(drawing: Any) -> int:
    return sum(len(part) for part in (drawing.background, drawing.composite, *drawing.layers) if part)


def mask_editor() -> gr.ImageEditor:
    """An editor whose value, for a handler, is the painted layer (RGBA), or None.

    Update only its value: for any other update gradio would make another component, without the limits.
    """
    colours = [f"rgba({red}, {green}, {blue}, {OPACITY})" for red, green, blue in (LEARNED, LEFT_OUT)]
    editor = gr.ImageEditor(
        label="Mask",
        show_label=False,
        elem_id="mask_editor",
        sources=(),
        transforms=(),
        layers=False,
        format="png",
        buttons=[],
        interactive=True,
        canvas_size=(EDIT_PX, EDIT_PX),
        brush=gr.Brush(default_size=BRUSH_PX, colors=colours, default_color=colours[0], color_mode="fixed"),
        eraser=gr.Eraser(default_size=BRUSH_PX),
    )
    editor.blob_storage = Drawings()
    accept = editor.accept_blobs

    def accept_blobs(data: Any) -> None:
        if data.data["type"] != "layer":  # the server has the photo
            return
        if str(data.data["index"]) != "0":
            raise fastapi.HTTPException(400, "there is one layer")
        accept(data)

    accept_blobs._is_server_fn = True
    editor.accept_blobs = accept_blobs
    editor.preprocess = lambda payload: painted_of(editor, payload)
    return editor


def painted_of(editor: gr.ImageEditor, payload: Any) -> PIL.Image.Image | None:
    if payload is None:
        return None
    sent = editor.blob_storage.pop(payload.id, None) if payload.id is not None else payload
    layers = [layer for layer in sent.layers if layer] if sent is not None else []
    return opened(layers[0]) if layers else None


def opened(layer: Any) -> PIL.Image.Image:
    """The layer as RGBA. Raises gr.Error unless it is a small picture."""
    source = io.BytesIO(layer) if isinstance(layer, bytes | bytearray) else layer.path
    try:
        with PIL.Image.open(source, formats=["PNG", "WEBP"]) as image:
            if image.width * image.height <= MOST_PIXELS:
                return image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        pass
    raise gr.Error(TOO_LARGE, duration=12, print_exception=False)
