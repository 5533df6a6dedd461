"""Pictures and masks as people give them -> tensors: of Pillow, numpy or torch, one or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

Picture = Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]
Size = tuple[int | None, int | None]


def to_pictures(image: Pictures | None, size: Size = (None, None), latents: int | None = None) -> Tensor:
    """(n, 3, H, W) in [-1, 1], float32.

    Args:
        image: Pillow's, upright and on white; numpy's (H, W, 3) or (n, H, W, 3) and torch's (3, H, W) or (n, 3, H, W),
            in [0, 1] or of whole numbers 0 to 255; grey ones too. A list must be of one kind and size.
        size: height and width to bring them to, by Lanczos as in stock, numbers by their nearest; their own if not
            given.
        latents: channels of latents, which a tensor may have in the place of colours: it stays as it is then.
    Raises:
        ValueError: none, another kind or shape, sizes that differ, numbers outside the range or not finite.
    """
    given = _each(image, "image")
    if latents not in (None, 1, 3) and isinstance(given[0], Tensor) and given[0].shape[-3] == latents:
        return torch.cat([x if x.ndim == 4 else x[None] for x in given])
    return 2 * _stacked(given, "image", size, grey=False) - 1


def to_masks(mask: Pictures | None, size: Size) -> Tensor:
    """(n, 1, H, W), 1 where it is to be painted anew and 0 where not, cut at 0.5; float32.

    Args:
        mask: as ``to_pictures`` takes them, grey, and without the last of numpy's or the first of torch's dimensions
            too. White is painted anew; in uint8 without a number above 1, that is 1, as in stock.
        size: height and width to bring them to.
    Raises:
        ValueError: as ``to_pictures``.
    """
    return (_stacked(_each(mask, "mask_image"), "mask_image", size, grey=True) >= 0.5).float()


def size_of(image: Pictures | None, name: str = "image") -> tuple[int, int]:
    """Height and width of the first one."""
    first = _each(image, name)[0]
    if isinstance(first, Image.Image):
        width, height = ImageOps.exif_transpose(first).size
        return height, width
    if isinstance(first, Tensor):
        return first.shape[-2], first.shape[-1]
    h, w = first.shape[-3:-1] if first.ndim > 2 and first.shape[-1] in (1, 3) else first.shape[-2:]
    return int(h), int(w)


def cut_out(
    image: Any, mask: Any, padding: int, size: tuple[int, int]
) -> tuple[Image.Image, Image.Image, Callable[[Image.Image], Image.Image]]:
    """What of a picture is near the white of its mask, both brought to ``size`` (height, width), and the function that
    puts a picture drawn for it back into the whole, where the mask says so. As in stock, by diffusers' own code.

    Raises:
        ValueError: they are not one picture of Pillow each, of one size; nothing is white.
    """
    if not (isinstance(image, Image.Image) and isinstance(mask, Image.Image) and image.size == mask.size):
        raise ValueError("padding_mask_crop: expected one picture of Pillow and one mask, of the same size")
    image, mask = _plain(image, "RGB"), _plain(mask, "L")
    if mask.getbbox() is None:
        raise ValueError("padding_mask_crop: mask_image is black all over, so there is nothing to cut out")
    processor: Any = VaeImageProcessor()
    box = processor.get_crop_region(mask, size[1], size[0], pad=padding)

    def back(drawn: Image.Image) -> Image.Image:
        return processor.apply_overlay(mask, image, drawn, box)

    near = (processor.resize(x.crop(box), *size, resize_mode="fill") for x in (image, mask))
    return (*near, back)  # type: ignore[return-value]


def _each(image: Any, name: str) -> list[Any]:
    several = list(image) if isinstance(image, Sequence) else [image]
    kinds = {next((kind for kind in (Image.Image, np.ndarray, Tensor) if isinstance(x, kind)), None) for x in several}
    if len(kinds) != 1 or None in kinds or not several:
        what = " and ".join(sorted({type(x).__name__ for x in several})) or "an empty list"
        raise ValueError(f"{name} is {what}; expected a picture of Pillow, numpy or torch, or a list of one kind")
    return several


def _stacked(given: list[Any], name: str, size: Size, *, grey: bool) -> Tensor:
    """(n, 1 or 3, H, W) in [0, 1]."""
    batches = [_batch(x, name, size, grey=grey) for x in given]
    shapes = {tuple(x.shape[1:]) for x in batches}
    if len(shapes) > 1:
        sizes = " and ".join(sorted(f"{h} by {w}" for _, h, w in shapes))
        raise ValueError(f"{name}: pictures of {sizes} pixels together; give height and width, or one size")
    return torch.cat(batches)


def _batch(x: Any, name: str, size: Size, *, grey: bool) -> Tensor:
    channels = 1 if grey else 3
    if isinstance(x, Image.Image):
        x = _plain(x, "L" if grey else "RGB")
        height, width = size[0] or x.height, size[1] or x.width
        if x.size != (width, height):
            x = x.resize((width, height), Image.Resampling.LANCZOS)
        numbers = torch.from_numpy(np.array(x, dtype=np.float32) / 255)
        return numbers.view(1, height, width, channels).permute(0, 3, 1, 2)
    if isinstance(x, np.ndarray):
        x = x[..., None] if x.ndim == 2 or (grey and x.ndim == 3 and x.shape[-1] not in (1, 3)) else x
        x = torch.from_numpy(np.array(x[None] if x.ndim == 3 else x, order="C"))  # not one that is read-only or flipped
        x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
    else:
        x = x.detach()
        x = x[None] if x.ndim == 2 else x
        x = x[:, None] if grey and x.ndim == 3 else x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[1] not in ({1} if grey else {1, 3}):
        order = "(H, W, 3)" if not grey else "(H, W)"
        raise ValueError(f"{name}: shape {tuple(x.shape)}; expected numpy's {order}, torch's (3, H, W), or n of them")
    whole = x.dtype == torch.uint8 and not (grey and x.max() <= 1)
    x = x.float() / 255 if whole else x.float()
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):  # NaN is not either
        raise ValueError(
            f"{name}: numbers from {low:g} to {high:g}; expected 0 to 1, or uint8. Of a picture in [-1, 1] give "
            "x / 2 + 0.5"
        )
    if size != (None, None):
        x = F.interpolate(x, size=(size[0] or x.shape[-2], size[1] or x.shape[-1]))
    return x.expand(-1, channels, -1, -1)


def _plain(picture: Image.Image, mode: str) -> Image.Image:
    """Upright, on white."""
    picture = ImageOps.exif_transpose(picture)
    if mode == "RGB" and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)
