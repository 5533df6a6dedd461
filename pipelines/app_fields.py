"""The page's two picture fields, with bounds that gradio's own lack: on what a file may be, and on what is kept of it.

The bounds are set on the objects: gradio writes a stub file beside the source of every class derived from its own.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps
from starlette.exceptions import HTTPException

FORMATS = ("PNG", "JPEG", "WEBP")  # by content: Pillow knows many more, and runs another program for some
PIXELS = 2**26  # of a picture: a small file may unfold to gigabytes
LAYERS = 8  # of an editor


def opened(file: str | Path | bytes | None) -> Image.Image | None:
    """The picture, upright, in RGB, or in RGBA where it is transparent.

    Raises:
        gr.Error: not a picture of ``FORMATS``, a damaged one, or one of more than ``PIXELS``.
    """
    if file is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIXELS is less than what it warns of
            picture = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
        if picture.width * picture.height > PIXELS:
            raise ValueError(f"{picture.width} x {picture.height}, expected at most {PIXELS:,} pixels")
        picture = ImageOps.exif_transpose(picture)
        return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    except Exception as error:  # decoders raise what they like
        why = str(error) if type(error) is ValueError else f"it cannot be read as {', '.join(FORMATS)}"
        raise gr.Error(f"Picture: {why}", duration=12, title="Not drawn", print_exception=False) from error


def bound_image(image: gr.Image) -> gr.Image:
    """Opens files that were uploaded, and nothing else; gives RGB or RGBA."""
    image.preprocess = lambda payload: None if payload is None else opened(payload.path)  # type: ignore[method-assign]
    return image


def bound_editor(editor: gr.ImageEditor, kept: int) -> gr.ImageEditor:
    """The same for the editor, which is sent its layers ahead of the job that uses them; gives RGBA.

    Args:
        kept: unused drawings that are held; gradio holds all, for ever.
    """
    accept = editor.accept_blobs

    def accept_blobs(data: Any) -> None:
        said = getattr(data, "data", None)
        index = said.get("index") if isinstance(said, dict) else "none"
        if index not in (None, "", "null", *map(str, range(LAYERS))) or not data.files:
            raise HTTPException(400, "not a layer")  # gradio makes a list as long as it is told
        accept(data)
        while len(editor.blob_storage) > kept:
            editor.blob_storage.pop(next(iter(editor.blob_storage)), None)

    def convert(file: Any, flatten_on_white: bool = False) -> Image.Image | None:
        picture = opened(getattr(file, "path", file))
        return picture and picture.convert("RGBA")

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]
    editor.accept_blobs = accept_blobs  # type: ignore[method-assign]
    editor.convert_and_format_image = convert  # type: ignore[method-assign]
    return editor
