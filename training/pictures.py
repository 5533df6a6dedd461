"""Encoded pictures -> uint8 of a given shape, with Pillow. A result is defined for every mode that Pillow reads."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

# Text and colour profiles of valid PNGs (editing histories, workflows) are larger than Pillow's 1 MB
# a chunk and 64 MB in all; they are never read here.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

HEIF = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))
HEIF_ADVICE = "`pip install pillow-heif` makes them readable, or convert them to JPEG"
# Formats that Pillow names but does not decode to pixels by itself, documents and films.
NO_PICTURES = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"))
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


def _fitted(picture: Image.Image, shape: tuple[int, int], center_crop: bool) -> Image.Image:
    """The middle of a picture that is scaled to cover (H, W), or the whole squeezed, by Lanczos with antialiasing."""
    height, width = upright_size(picture)
    scale = max(shape[0] / height, shape[1] / width)
    if picture.format == "JPEG":  # decode at 1/2, 1/4 or 1/8 where that still holds enough pixels
        picture.draft(None, (math.ceil(picture.width * scale - 1e-6), math.ceil(picture.height * scale - 1e-6)))
    picture = to_rgb(picture)
    box = _box(picture.size, shape, center_crop)
    target = (shape[1], shape[0])
    return picture if picture.size == target else picture.resize(target, Image.Resampling.LANCZOS, box=box)


def _box(size: tuple[int, int], shape: tuple[int, int], center_crop: bool) -> tuple[float, float, float, float]:
    """What of a picture of ``size`` (W, H) is kept for (H, W): left, top, right, bottom."""
    width, height = size
    if not center_crop:
        return 0, 0, width, height
    kept = min(width, height * shape[1] / shape[0]), min(height, width * shape[0] / shape[1])
    left, top = (width - kept[0]) / 2, (height - kept[1]) / 2
    return left, top, left + kept[0], top + kept[1]


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Height and width after the EXIF rotation, from the header alone."""
    if picture.format == "PNG" and "exif" not in picture.info:  # Pillow would decode it to look behind the pixels
        return picture.height, picture.width
    turned = picture.getexif().get(0x0112) in (5, 6, 7, 8)
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def decode(data: bytes, size: int | tuple[int, int], center_crop: bool = True) -> np.ndarray:
    """An encoded picture as uint8 (3, H, W), or (3, size, size).

    Args:
        center_crop: scale the picture to cover the shape and cut off evenly on both sides what is over; False
            squeezes the whole into it.
    Raises:
        ValueError: with the reason why it does not decode.
    """
    shape = (size, size) if isinstance(size, int) else size
    with header(data) as picture:
        try:
            return np.ascontiguousarray(np.asarray(_fitted(picture, shape, center_crop)).transpose(2, 0, 1))
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"does not decode ({one_line(error)})") from error


def decode_mask(data: bytes, shape: tuple[int, int], center_crop: bool = True) -> np.ndarray:
    """An encoded grey picture, cut as the picture it belongs to, as float32 (1, H, W) in [0, 1]."""
    with header(data) as picture:
        try:
            grey = to_rgb(picture).convert("L")
            box = _box(grey.size, shape, center_crop)
            grey = grey.resize((shape[1], shape[0]), Image.Resampling.BOX, box=box)  # no ringing beyond [0, 1]
        except Exception as error:
            raise ValueError(f"does not decode ({one_line(error)})") from error
        return np.asarray(grey, np.float32)[None] / 255


def dimensions(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded picture as it is shown, from its header. Raises ValueError."""
    with header(data) as picture:
        try:
            height, width = upright_size(picture)
        except Exception as error:  # EXIF can be broken too
            raise ValueError(f"does not decode ({one_line(error)})") from error
        if not (height and width):
            raise ValueError("does not decode (it has no pixels)")
        return height, width


@lru_cache(maxsize=1)
def _register_heif() -> bool:
    """Make HEIF readable where pillow-heif is installed, once in each process."""
    if find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


@lru_cache(maxsize=1)
def picture_endings() -> frozenset[str]:
    """Endings in lower case of the files that can be decoded."""
    heif = _register_heif()
    known = Image.registered_extensions().items()
    endings = {ending for ending, name in known if name in Image.OPEN and name not in NO_PICTURES}
    return frozenset(endings if heif else endings - HEIF)


def _refusal(data: bytes, error: Exception) -> str:
    """Why Pillow does not open encoded bytes; its own error names no reason where every format declined."""
    if not isinstance(error, Image.UnidentifiedImageError):
        return one_line(error)
    for name in Image.ID:
        factory, accept = Image.OPEN[name]
        try:
            answer = accept is not None and accept(data[:16])
        except Exception:  # of too few bytes
            continue
        if isinstance(answer, str):
            return answer
        try:
            if answer:
                factory(io.BytesIO(data), "")
        except Exception as reason:
            return f"{name}: {one_line(reason)}"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return f"a HEIF picture; {HEIF_ADVICE}"
    return "not a picture in a known format"


def header(data: bytes) -> Image.Image:
    """Opened, not decoded. Raises ValueError where no picture is known in it, or one that is too large."""
    _register_heif()
    try:
        picture = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"claims to be too large, a decompression bomb perhaps ({one_line(error)})") from error
    except Exception as error:
        reason = "is empty" if not data else f"does not decode ({_refusal(data, error)})"
        raise ValueError(reason) from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"claims to be {width} × {height}, over {MAX_PIXELS} pixels: a decompression bomb perhaps")
    return picture


def one_line(error: BaseException) -> str:
    """The first line of an error's message, and of its cause where it has none itself."""
    text = str(error).strip() or type(error).__name__
    cause = str(error.__cause__ or "").strip()
    if cause and cause not in text and not isinstance(error, ValueError):
        text += f": {cause}"
    return " ".join(text.split())[:300]
