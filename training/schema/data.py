"""Where pictures and captions come from, and how they are cut."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from .base import AboveZero, Positive, Section, Share

Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
CAPTIONS = (
    "caption_column",
    "caption_extension",
    "caption_lines",
    "split_captions_at",
    "caption_templates",
)  # what captions are of


class Source(Section):
    """One of several places that rows come from. What is left out is as in the section ``data``."""

    path: str
    image_column: str | None = None
    caption_column: str | None = None
    mask_column: str | None = None
    instance_prompt: Prompt | None = None  # the whole caption of each of its pictures, in place of their own
    loss_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # what each of its pictures counts
    repeats: AboveZero = 1.0  # an epoch shows each row this often; of a fraction, a fixed subset of the rows once more

    @model_validator(mode="after")
    def _one_caption(self) -> Self:
        return _one_caption(self)


class Data(Section):
    """Where the pictures and captions come from, and how they are cut."""

    path: str | None = None  # imagefolder, parquet or tar file, folder or URL of such, or hub:owner/name
    sources: tuple[Source, ...] = ()  # several of them, in place of path
    streaming: bool = False  # read parquet or tar files from front to back, for what is too large to be indexed
    storage_options: dict[str, Any] = Field(default_factory=dict)  # of fsspec's file system; no credentials
    shard_cache: str | None = None  # folder of the local copies of remote files; None: beside the cache of datasets
    shard_cache_gb: AboveZero = 50.0  # the largest size of those copies, in 10^9 bytes
    held_out: Annotated[float, Field(ge=0, lt=1)] = (
        0.05  # share kept for validation where the source has one split; 0: none
    )
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
    hint_column: str | None = None  # of conditioning image: each row's second picture
    hint_suffix: str | None = None  # imagefolder: that of a.jpg is a + this, as in "-sketch.png"
    mask_suffix: str | None = None  # imagefolder: the mask of a.jpg is a + this, as in "-masklabel.png"

    instance_prompt: Prompt | None = None  # the whole caption of every picture, in place of all that follows
    caption_column: str | None = "text"  # text, or a list of texts; None: no captions
    caption_extension: str = ".txt"  # without metadata: the caption of a.jpg is in a.txt; .caption and others are found
    caption_lines: str = "all"  # of a text with several lines: all, the first, or a language: "de" takes de.utf8=…
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
        return tuple(self._read(source) for source in listed)

    def _read(self, source: Source) -> Source:
        keys = ("image_column", "caption_column", "mask_column", "instance_prompt")
        update: dict[str, Any] = {key: getattr(source, key) or getattr(self, key) for key in keys}
        if source.caption_column:
            update["instance_prompt"] = None  # the source's own word
        elif update["instance_prompt"]:
            update["caption_column"] = None
        return source.model_copy(update=update)

    @property
    def beside(self) -> tuple[str, ...]:
        """How files of an imagefolder end that are no rows of their own."""
        return tuple(suffix for suffix in (self.mask_suffix, self.hint_suffix) if suffix)

    @field_validator("storage_options")
    @classmethod
    def _no_credentials(cls, options: dict[str, Any]) -> dict[str, Any]:
        public = ("anon", "cloud", "google_default", None, False)  # of gcsfs and huggingface_hub
        for name in ("key", "secret", "token", "password"):
            if name in options and options[name] not in public:
                raise ValueError(
                    f"{name}: the config is written into the run's folder, so credentials do not belong into it; set "
                    "them in the environment (AWS_ACCESS_KEY_ID …, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN)"
                )
        return options

    @field_validator("caption_templates")
    @classmethod
    def _has_room(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r}: expected one {{}}, where the caption goes")
        return templates

    @field_validator("caption_lines")
    @classmethod
    def _lines(cls, text: str) -> str:
        if not re.fullmatch(r"all|first|[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*", text):
            raise ValueError("expected all, first, or a language as in de or pt-BR")
        return text

    @field_validator("caption_extension")
    @classmethod
    def _ending(cls, text: str) -> str:
        if not text.strip(". "):
            raise ValueError("expected an ending of files, as in .txt")
        return text if text[0] in ".-_" else f".{text}"

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
        for what in ("mask", "hint"):
            if getattr(self, f"{what}_column") and getattr(self, f"{what}_suffix"):
                raise ValueError(f"{what}_column and {what}_suffix are both given; give one of them")
        if self.sources and not any(source.loss_weight for source in self.sources):
            raise ValueError("every source has a loss_weight of 0: nothing would be learned")
        if self.streaming and any(source.instance_prompt or source.loss_weight != 1 for source in self.sources):
            raise ValueError(
                "instance_prompt and loss_weight of a source are not for streaming; leave streaming out, or give one "
                "data.instance_prompt to all of a stream"
            )
        return _one_caption(self)


def _one_caption(section: Any) -> Any:
    fields = type(section).model_fields
    given = [key for key in CAPTIONS if key in fields and getattr(section, key) not in (None, fields[key].default)]
    if section.instance_prompt and given:
        raise ValueError(f"instance_prompt is the caption of every picture; leave {given[0]} out, or instance_prompt")
    return section
