"""Contact sheets: many pictures on one, with small captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .features import to_unit

GAP = 8  # pixels around each cell
LINES = 2  # of a caption at most

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def picture_grid(
    pictures: Tensor | Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    *,
    cell: int = 128,
    font_size: int = 12,
    background: str = "#ffffff",
    ink: str = "#333333",
) -> Image.Image:
    """Pictures in rows of ``columns`` (left out: about a square), each with its caption below it.

    Args:
        pictures: (B, 3, H, W) uint8 or float in [0, 1], or PIL pictures; all are shown ``cell`` pixels wide.
        captions: one for each picture; cut with an ellipsis after two lines.
    Raises:
        ValueError: no pictures, or another number of captions.
    """
    shown = to_pil(pictures) if isinstance(pictures, Tensor) else [p.convert("RGB") for p in pictures]
    if not shown:
        raise ValueError("picture_grid: no pictures")
    if captions is not None and len(captions) != len(shown):
        raise ValueError(f"picture_grid: {len(captions)} captions for {len(shown)} pictures")
    if columns is None:
        columns = math.ceil(math.sqrt(len(shown)))
    columns = max(1, min(columns, len(shown)))
    shown = [p.resize((cell, max(1, round(cell * p.height / p.width))), Image.Resampling.BICUBIC) for p in shown]
    font = ImageFont.load_default(font_size)
    line = font_size + 3
    row_height = max(p.height for p in shown) + (LINES * line + 3 if captions is not None else 0) + GAP
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), GAP + rows * row_height), background)
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(shown):
        x, y = GAP + i % columns * (cell + GAP), GAP + i // columns * row_height
        sheet.paste(picture, (x, y))
        for j, text in enumerate(_wrap(captions[i], cell, draw, font) if captions is not None else []):
            draw.text((x + cell / 2, y + picture.height + 3 + j * line), text, fill=ink, font=font, anchor="ma")
    return sheet


def pairs_grid(originals: Tensor, reconstructions: Tensor, columns: int = 4, *, cell: int = 128) -> Image.Image:
    """Each original with its reconstruction to the right of it, ``columns`` pairs in a row.

    Both (B, 3, H, W), uint8 or float in [0, 1].
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"pairs_grid: originals {tuple(originals.shape)}, reconstructions {tuple(reconstructions.shape)}: "
            "expected the same shape"
        )
    both = torch.stack([to_unit(originals), to_unit(reconstructions)], 1).flatten(0, 1)  # (2B, 3, H, W)
    return picture_grid(both, ["original", "reconstruction"] * len(originals), 2 * columns, cell=cell)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W), uint8 or float in [0, 1] -> RGB pictures."""
    pixels = (to_unit(pictures.detach().cpu()) * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def _wrap(text: str, width: int, draw: ImageDraw.ImageDraw, font: Font) -> list[str]:
    """``text`` in at most ``LINES`` lines of at most ``width`` pixels."""

    def fits(s: str) -> bool:
        return draw.textlength(s, font=font) <= width

    words, lines = text.split(), []
    while words and len(lines) < LINES:
        count = 1
        while count < len(words) and fits(" ".join(words[: count + 1])):
            count += 1
        if len(lines) == LINES - 1:
            count = len(words)  # the last line takes the rest and is cut below
        lines.append(" ".join(words[:count]))
        words = words[count:]
    return [s if fits(s) else _cut(s, fits) for s in lines]


def _cut(text: str, fits: Callable[[str], bool]) -> str:
    while text and not fits(text + "…"):
        text = text[:-1]
    return text.rstrip() + "…"
