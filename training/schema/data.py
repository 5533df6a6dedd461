"""Where pictures and captions come from, and how they are cut."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from .base import AboveZero, Positive, Section, Share


class Source(Section):
    """One of several places that rows come from. What is left out is as in the section ``data``."""

    path: str
    image_column: str | None = None
    caption_column: str | None = None
    mask_column: str | None = None
    repeats: AboveZero = 1.0  # an epoch shows each row this often; of a fraction, a fixed subset of the rows once more


class Data(Section):
    """Where the pictures and captions come from, and how they are cut."""

    path: str | None = None  # imagefolder, parquet or tar file, folder of such, or hub:owner/name
    sources: tuple[Source, ...] = ()  # several of them, in place of path
    streaming: bool = False  # read parquet or tar files from front to back, for what is too large to be indexed
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05  # share kept for validation where the source has one split
    max_skipped: Share = 0.01  # the largest share of rows that may be of no use
    verify: bool | None = None  # decode every picture before the run; None: up to 200,000 rows, above it their headers

    image_column: str = "image"
    resolution: Positive = 64  # pixels of a square's side; its area is that of every bucket
    center_crop: bool = True  # False: squeeze the whole picture into its square or bucket
    random_crop: Positive | None = None  # autoencoder: train on random crops of this many pixels
    random_flip: bool = False
    buckets: bool = True  # pictures keep their shape, by the nearest of some aspect ratios; the diffusion task's
    bucket_step: Positive | None = None  # a bucket's sides are its multiples; None: what the networks need
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 2.0  # of a bucket; what is longer is cut to it
    mask_column: str | None = None  # weights of the loss at each pixel, as grey pictures: white counts, black does not
    mask_suffix: str | None = None  # imagefolder: the mask of a.jpg is a + this, as in "-masklabel.png"

    caption_column: str | None = "text"  # text, or a list of texts; None: no captions
    caption_extension: str = ".txt"  # imagefolder without metadata: the caption of a.jpg is in a.txt
    split_captions_at: str | None = None  # a caption is several that are taken in turns, parted by this, as in "\n"
    caption_templates: tuple[str, ...] = ()  # taken in turns, as in "a photo of {}"
    shuffle_tags: bool = False  # the tags of a caption in another order each time
    tag_separator: Annotated[str, Field(min_length=1)] = ","
    keep_tags: Annotated[int, Field(ge=0)] = 0  # the first tags, which stay where they are
    long_captions: Literal["cut", "chunk", "refuse"] = "cut"  # of captions that are longer than the text encoder reads

    @property
    def places(self) -> tuple[Source, ...]:
        """All sources, with the columns that each is read by."""
        listed = self.sources or (Source(path=self.path or ""),)
        columns = ("image_column", "caption_column", "mask_column")
        return tuple(s.model_copy(update={k: getattr(s, k) or getattr(self, k) for k in columns}) for s in listed)

    @field_validator("caption_templates")
    @classmethod
    def _has_room(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r}: expected one {{}}, where the caption goes")
        return templates

    @field_validator("split_captions_at")
    @classmethod
    def _parts(cls, text: str | None) -> str | None:
        if text == "":
            raise ValueError("expected a text that parts captions, or null")
        return text

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.path is None and not self.sources:
            error: Any = {"type": "missing", "loc": ("path",), "input": None}
            raise ValidationError.from_exception_data("Data", [error])
        if self.path is not None and self.sources:
            raise ValueError("path and sources are both given; give one of them")
        if self.bucket_step and self.resolution % self.bucket_step:
            raise ValueError(f"resolution {self.resolution} is not a multiple of bucket_step {self.bucket_step}")
        if self.mask_column and self.mask_suffix:
            raise ValueError("mask_column and mask_suffix are both given; give one of them")
        return self
