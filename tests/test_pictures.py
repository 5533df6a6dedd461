"""Encoded pictures -> arrays: one defined result for every mode that Pillow reads, and a reason where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.datasets_made import bomb, noise
from tests.datasets_made import encoded as png
from training.pictures import decode


def test_centre_crop_by_position():
    """24 × 16 at 16: columns 4 to 19 as they are, nothing resampled."""
    picture = noise(1)
    assert np.array_equal(decode(png(picture), 16).transpose(1, 2, 0), np.asarray(picture)[:, 4:20])


def test_resize_is_pillows_lanczos_then_crop():
    """Against the two steps in their plain order; one step of rounding in 8 bits apart."""
    picture = noise(2, 60, 40)
    plain = picture.resize((30, 20), Image.Resampling.LANCZOS).crop((5, 0, 25, 20))
    got = decode(png(picture), 20).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - np.asarray(plain)).max() <= 1


def test_without_crop_the_whole_is_squeezed():
    picture = Image.new("RGB", (30, 10), "black")
    picture.paste("white", (15, 0, 30, 10))
    got = decode(png(picture), 10, center_crop=False)
    assert got[:, :, :4].max() < 10 and got[:, :, 6:].min() > 245


def test_antialiasing_keeps_the_mean():
    """A checkerboard of single pixels becomes grey, where nearest neighbour would give stripes."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    got = decode(png(board), 16)[:, 2:-2, 2:-2].astype(float)
    assert np.abs(got - 127.5).max() < 2


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("RGBA", (8, 8), (200, 0, 0, 0)), (255, 255, 255)),  # wholly transparent: white, not black
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 257 * 40, np.uint16)), (40, 40, 40)),  # Pillow alone would clip to 255
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.new("RGB", (2, 300), (9, 8, 7)), (9, 8, 7)),
    ],
)
def test_every_mode_has_a_defined_result(picture: Image.Image, expected: tuple[int, int, int]):
    got = decode(png(picture), 8)
    assert got.shape == (3, 8, 8) and got.dtype == np.uint8
    assert (np.abs(got.reshape(3, -1).astype(int) - np.array(expected)[:, None]) <= 1).all()


def test_palette_with_a_transparent_colour():
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(png(picture), 8)[:, 0, 0].tolist() == [255, 0, 0]
    assert decode(png(picture, transparency=1), 8)[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("kind", "tolerance"), [("TIFF", 0), ("JPEG", 2)])  # JPEG is lossy
def test_cmyk_and_float(kind: str, tolerance: int):
    got = decode(png(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind), 8)  # no cyan: red
    assert np.abs(got[:, 0, 0].astype(int) - [255, 0, 0]).max() <= tolerance
    if kind == "TIFF":
        assert decode(png(Image.new("F", (8, 8), 0.2), kind), 8)[:, 0, 0].tolist() == [51, 51, 51]


def test_exif_rotation_is_applied():
    """Orientation 6: the camera was turned; the file's left edge is the picture's top."""
    picture = Image.new("RGB", (32, 32), "blue")
    picture.paste("red", (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode(png(picture, "JPEG", exif=exif, quality=95), 8)
    assert got[0, :3].min() > 200 and got[2, :3].max() < 60  # top red
    assert got[2, 5:].min() > 200 and got[0, 5:].max() < 60


def test_a_large_jpeg_is_decoded_small(monkeypatch: pytest.MonkeyPatch):
    """With draft the answer is that of a full decode to a few grey levels, on a smooth picture."""
    ramp = np.linspace(0, 255, 512).round().astype(np.uint8)
    across = np.tile(ramp, (512, 1))
    smooth = Image.fromarray(np.stack([across, across.T, np.full_like(across, 90)], 2))
    sizes, real = [], Image.Image.resize

    def spy(self, *args, **kwargs):
        sizes.append(self.size)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy)
    got = decode(png(smooth, "JPEG", quality=95), 60)
    assert sizes == [(64, 64)]  # an eighth, still at least 60
    full = decode(png(smooth), 60)
    assert sizes[1] == (512, 512)
    assert np.abs(got.astype(int) - full).max() <= 4


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow warns of the first and raises for the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header(side: int):
    with pytest.raises(ValueError, match="decompression bomb"):
        decode(bomb(side, side), 8)


@pytest.mark.parametrize("broken", [b"", b"GIF89a", b"no picture", png(noise(0, 200, 200))[:3000], bomb(50, 50)])
def test_what_does_not_decode(broken: bytes):
    with pytest.raises(ValueError, match=r"does not decode|is empty"):
        decode(broken, 8)
