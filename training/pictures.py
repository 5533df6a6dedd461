"""Encoded pictures -> uint8 squares, with Pillow. A result is defined for every mode that Pillow reads."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own limit: a 268 MB RGB picture; what claims more is taken for a decompression bomb


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any picture as upright 8-bit RGB on white.

    The EXIF orientation is applied. Alpha and transparent colours are composed on white. 16-bit grey is divided by 257,
    clipped where the file holds wider integers; floating-point grey is taken as [0, 1]. CMYK and the rest are
    converted by Pillow, without colour profiles. Of an animation the first frame is taken.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = np.asarray(picture).astype(np.float64) / (1 / 255 if picture.mode == "F" else 257)
        picture = Image.fromarray(np.nan_to_num(grey).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _fitted(picture: Image.Image, size: int, center_crop: bool) -> Image.Image:
    """RGB of size × size: the middle square, or the whole squeezed, by Lanczos with antialiasing."""
    width, height = picture.size
    side = min(width, height)
    if picture.format == "JPEG":  # decode at 1/2, 1/4 or 1/8 where that still holds enough pixels
        picture.draft(None, (-(-width * size // side), -(-height * size // side)))
    picture = to_rgb(picture)
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if center_crop else (0, 0, width, height)
    if (width, height) == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=box)


def decode(data: bytes, size: int, center_crop: bool = True) -> np.ndarray:
    """An encoded picture as uint8 (3, size, size). Raises ValueError with the reason where that cannot be done."""
    with header(data) as picture:
        try:
            return np.ascontiguousarray(np.asarray(_fitted(picture, size, center_crop)).transpose(2, 0, 1))
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"does not decode ({one_line(error)})") from error


def header(data: bytes) -> Image.Image:
    """Opened, not decoded. Raises ValueError where no picture is known in it, or one that is too large."""
    try:
        picture = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"claims to be too large, a decompression bomb perhaps ({one_line(error)})") from error
    except Exception as error:
        reason = "is empty" if not data else "does not decode (not a picture in a known format)"
        raise ValueError(reason) from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"claims to be {width} × {height}, over {MAX_PIXELS} pixels: a decompression bomb perhaps")
    return picture


def one_line(error: BaseException) -> str:
    """The first line of an error's message, and of its cause where it has none itself."""
    text = str(error).strip() or type(error).__name__
    if error.__cause__ is not None and not isinstance(error, ValueError):
        text += f": {error.__cause__}"
    return " ".join(text.split())[:300]
