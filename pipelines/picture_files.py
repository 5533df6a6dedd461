"""The settings of a picture in its file, so that it can be drawn again.

A PNG holds JSON under the key ``ldm``, and under ``parameters`` the lines that A1111's web UI and the
like show. JPEG and WebP hold the same JSON as the EXIF field UserComment.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger(__name__)
KEY, LINES = "ldm", "parameters"
LONGEST = 1 << 20  # bytes of a text chunk; a page of prompt is 4 kB
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT = (b"tEXt", b"zTXt", b"iTXt")
EXIF = ("JPEG", "WEBP")  # formats whose settings are in EXIF
EXIF_IFD, USER_COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"  # EXIF 2.32, table 7 and 4.6.5
LONGEST_EXIF = 60_000  # bytes: a JPEG segment has 65,533
WHOLE = 1 << 26  # bytes of a file that is hashed as a whole; of a larger one PLACES blocks of 64 kB
PLACES, BLOCK = 64, 1 << 16

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """What is known in ``ldm``, and of which type; the keywords of a pipeline's call have their names. Others may be
    there (a later version's), and are given back as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Name | None = None  # pipeline folder, or a name on the hub
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None  # of the first of ``pictures``
    pictures: Positive | None = None  # drawn together, with seeds that follow one another
    index: Annotated[int, Field(ge=0)] | None = None  # which of them this is; None where all are on one sheet
    num_inference_steps: Positive | None = None
    guidance_scale: Number | None = None
    guidance_rescale: Number | None = None
    guidance: str | list[str | dict[str, str | Number]] | None = None
    sampler: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # of the weights
    height: Positive | None = None
    width: Positive | None = None
    long_prompt: str | None = None
    weighting: bool | None = None
    image: Name | None = None
    mask: Name | None = None
    strength: Number | None = None
    mode: str | None = None  # the page's word for what of these there is
    loras: dict[str, Number] | None = None  # file, folder or run -> weight
    lora_from: Number | None = None  # share of the steps without them
    embeddings: list[Name] | None = None  # files of new tokens
    digests: dict[str, str] | None = None  # of the model (its key is "model") and of all files that are named here
    versions: dict[str, str] | None = None  # of what drew


def keeps_settings(path: str | Path) -> bool:
    """Whether ``save_picture`` can store settings in a file of this name."""
    return _format(path) in ("PNG", *EXIF)


def save_picture(picture: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a picture with the settings that are not None, in the format that its name says.

    A format that has no place for settings (BMP, GIF …) is written without them.

    Raises:
        ValueError: no such format; a setting of another type than ``Settings`` has, or that JSON
            cannot write.
    """
    kind = _format(path)
    if kind is None:
        raise ValueError(f"{path}: not the name of a picture file; expected .png, .jpg or .webp")
    if kind == "PNG":
        save_png(picture, path, settings)
        return
    options: dict[str, Any] = {}
    if kind in EXIF:
        options = {"quality": 95}
        written = _json(settings, path)[1].encode()
        if len(written) <= LONGEST_EXIF:
            exif = Image.Exif()
            exif.get_ifd(EXIF_IFD)[USER_COMMENT] = ASCII + written
            options["exif"] = exif
        else:
            log.warning(
                "%s: written without its settings, which have %s bytes, and %s holds %s; a .png has room for them",
                path, f"{len(written):,}", kind, f"{LONGEST_EXIF:,}",
            )  # fmt: skip
    picture.save(path, kind, **options)


def _format(path: str | Path) -> str | None:
    """Pillow's name of the format that a file's ending says; None where Pillow writes none."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    return kind if kind in Image.SAVE else None


def save_png(picture: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG with the settings that are not None.

    Raises:
        ValueError: a setting of another type than ``Settings`` has, or that JSON cannot write.
    """
    given, written = _json(settings, path)
    info = PngInfo()
    info.add_text(KEY, written)
    info.add_text(LINES, lines(given).replace("\0", "").encode("utf-8", "replace").decode())
    picture.save(path, "PNG", pnginfo=info)


def _json(settings: Mapping[str, Any], path: str | Path) -> tuple[dict[str, Any], str]:
    """The settings that are not None, and their JSON, which is ASCII."""
    names = sorted(settings, key=[*Settings.model_fields, *settings].index)  # the same settings are the same bytes
    given = {name: settings[name] for name in names if settings[name] is not None}
    _checked(given, f"{path}: settings")
    try:
        return given, json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: settings that JSON cannot write ({error})") from error


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that ``save_picture`` wrote. The pixels are not decoded, and nothing is run.

    Raises:
        ValueError: no picture, no settings in it, more text than settings have, no JSON, or a value of another type.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such picture file")
    try:
        with path.open("rb") as file:
            png = file.read(len(SIGNATURE)) == SIGNATURE
            for kind, length in _chunks(file) if png else ():
                if kind in TEXT and length > LONGEST:
                    raise ValueError(f"holds a text of {length:,} bytes; settings have at most {LONGEST:,}")
        with Image.open(path, formats=["PNG"] if png else EXIF) as picture:
            found = picture.info.get(KEY) if png else _user_comment(picture)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no settings can be read from it: {error}") from error
    if isinstance(found, str) and len(found) > LONGEST:  # a small file may unfold to much
        raise ValueError(f"{path}: no settings can be read from it: a text of {len(found):,} characters is too large")
    if not isinstance(found, str):
        raise ValueError(
            f"{path}: there are no settings in it; `ldm sample` and `ldm app` write them, but programs that edit or "
            "send pictures often drop them"
        )
    try:
        given = json.loads(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its settings are damaged, they are not JSON ({str(error)[:100]})") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: its settings are damaged: {_short(given)}, expected a JSON object")
    return {name: value for name, value in _checked(given, f"{path}: its settings").items() if value is not None}


def _user_comment(picture: Image.Image) -> str | None:
    """EXIF's UserComment where it is ours: ASCII that begins as a JSON object."""
    comment = picture.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(ASCII + b"{"):
        return None
    return comment.removeprefix(ASCII).decode("ascii", "replace")


def lines(settings: Mapping[str, Any]) -> str:
    """As A1111's web UI writes and shows them."""
    scale, sampler = settings.get("guidance_scale"), settings.get("sampler")
    size = None if settings.get("width") is None else f"{settings['width']}x{settings.get('height')}"
    model = settings.get("model")
    told = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": sampler,
        "CFG scale": scale,
        "Seed": None if settings.get("seed") is None else settings["seed"] + settings.get("index", 0),
        "Size": size,
        "Model hash": (settings.get("digests") or {}).get("model", "")[:10] or None,
        "Model": None if model is None else Path(model).name,
        "Denoising strength": settings.get("strength"),
        "Lora": " ".join(f"{Path(name).stem}:{weight:g}" for name, weight in (settings.get("loras") or {}).items()),
        "Version": (settings.get("versions") or {}).get("ldm"),
    }
    first = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        first.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*first, ", ".join(f"{name}: {value}" for name, value in told.items() if value not in (None, ""))])


def digest(path: str | Path) -> str:
    """SHA-256 by which a changed model, LoRA or picture is told: of a pipeline folder the parts that its
    ``model_index.json`` names, of another folder its safetensors, their configs and tokenizers; their names in it too.
    Of a file above 64 MiB the size and 64 blocks all over it count: no training leaves those as they are.

    Raises:
        ValueError: no such file or folder, or nothing in it.
    """
    path = Path(path).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        kinds = (".safetensors", ".json", ".txt", ".model")
        index = path / "model_index.json"
        try:
            places = [path / name for name in json.loads(index.read_bytes())] if index.is_file() else [path]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{index}: not JSON that names parts ({error})") from error
        files = [x for place in places if place.is_dir() for x in sorted(place.rglob("*")) if x.suffix in kinds]
        files = [index, *files] if index.is_file() else files
    else:
        raise ValueError(f"{path}: no such file or folder")
    if not files:
        raise ValueError(f"{path}: there are no safetensors and configs in this folder")
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        if path.is_dir():
            found.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            if size <= WHOLE:
                found.update(opened.read())
                continue
            found.update(str(size).encode())
            for i in range(PLACES):
                opened.seek(i * (size - BLOCK) // (PLACES - 1))
                found.update(opened.read(BLOCK))
    return found.hexdigest()


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Type and length of each of a PNG's chunks before the picture, behind the signature."""
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        if kind == b"IDAT":
            return
        file.seek(length + 4, 1)


def _checked(given: Mapping[str, Any], what: str) -> dict[str, Any]:
    try:
        return Settings.model_validate(dict(given)).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(x) for x in first["loc"])
        raise ValueError(f"{what}: {place} is {_short(first['input'])}: {first['msg']}") from error


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else told[:60] + "…"
