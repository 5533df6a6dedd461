"""DreamBooth's prior preservation (Ruiz et al. 2022, eq. 2): pictures of the class, drawn by the base before it trains,
that are learned beside one's own.

The loss is that of diffusers' script, mean over one's own + prior_loss_weight · mean over the class pictures. Half of
the images are of each kind, and the loss is one mean over all of them: one's own count 2, class pictures
2 · prior_loss_weight. Over an epoch the two are equal; a batch, which is drawn from all rows, has half of each on
average, where the script has it exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.models.new_tokens import check_words
from pipelines.core import Parts, generate

from .cache import Together
from .encoders import text_hash, weights_hash
from .fit import ConfigError
from .index import counts
from .schema import AdaptConfig
from .schema.adapt import Prior
from .schema.data import Source
from .sources import pictures_in

AT_ONCE = 4  # pictures in a batch, always the same ones together: another batch would round differently
DRAWN = "__drawn_"  # readers of an imagefolder pass over folders of such names: these are sources of their own
MANIFEST = "manifest.json"


def class_pictures(
    config: AdaptConfig, parts: Parts, *, rank: int = 0, world: int = 1, wait: Callable[[], None] = lambda: None
) -> Path:
    """Draw what is missing of ``prior.num_class_images``, by all processes together.

    Pictures that lie in ``class_data_dir`` count, and are never touched. Others are drawn into a folder below it (below
    ``RUN/class_pictures`` where no folder is given), whose name tells base, prompt, steps, guidance, size and seed, as
    does its manifest: those of another base or prompt are not taken for them. Seed and number alone decide a picture.
    After a kill, what is there is taken up.

    Args:
        parts: the base as it is, before anything of it is changed.
        rank, world, wait: this process, how many there are, and what waits for all of them.
    Returns:
        The folder of drawn pictures, for ``with_prior``; there is none where enough are given.
    Raises:
        ConfigError: what cannot be with a prior; class pictures cannot be drawn by this base, or it draws what is no
            number.
        OSError: the folder cannot be written.
    """
    prior = _prior(config)
    try:
        check_words(parts.text, [prior.class_prompt])
    except ValueError as error:
        raise ConfigError(f"prior.class_prompt: {error}") from error
    count = prior.num_class_images - len(given(config))
    about = _about(config, prior, parts)
    key = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=6).hexdigest()
    folder = _root(config, prior) / f"{DRAWN}{key}"
    missing = [i for i in range(max(0, count)) if not _file(folder, i).is_file()]
    wait()  # nobody draws before all have looked
    if not missing:
        return folder
    if parts.net.config["in_channels"] != parts.channels:
        raise ConfigError(
            f"prior: the base takes {parts.net.config['in_channels']} channels, more than the latents', and cannot "
            f"draw from a prompt alone; put {prior.num_class_images} pictures of the class into prior.class_data_dir"
        )
    if rank == 0:
        _write(folder / MANIFEST, lambda file: file.write(json.dumps(about, indent=2, ensure_ascii=False).encode()))
    wanted, size = set(missing), _size(config, parts)
    for first in Together(rank, world, wait).shared(_firsts(missing), "drawing class pictures"):
        numbers = range(first, first + AT_ONCE)
        for i, picture in zip(numbers, _drawn(parts, prior, config.seed, numbers, size), strict=True):
            if i in wanted:
                _save(_file(folder, i), picture)
    return folder


def with_prior(config: AdaptConfig, drawn: Path) -> AdaptConfig:
    """The config whose data are one's own pictures and those of the class, as often in an epoch.

    Args:
        drawn: the folder that ``class_pictures`` names.
    Raises:
        ConfigError: what cannot be with a prior, or no class pictures.
        DataError: one's own pictures cannot be used.
    """
    prior, data = _prior(config), config.data
    weight = 2 * prior.prior_loss_weight
    folders = [_root(config, prior)] * bool(given(config)) + [drawn] * any(True for _ in _pictures(drawn))
    if not folders:
        raise ConfigError(f"prior: no class pictures in {drawn}; draw them first (class_pictures)")
    classes = [Source(path=str(x), instance_prompt=prior.class_prompt, loss_weight=weight) for x in folders]
    own = [place.model_copy(update={"loss_weight": 2 * place.loss_weight}) for place in data.places]
    update: dict[str, Any] = {"path": None, "mask_column": None, "instance_prompt": None}  # the places have them
    n = [
        sum(rows * place.repeats for rows, place in zip(counts(_of(data, some), "train"), some, strict=True))
        for some in (own, classes)
    ]
    own, classes = _repeated(own, max(1, n[1] / n[0])), _repeated(classes, max(1, n[0] / n[1]))
    return config.model_copy(update={"data": data.model_copy(update={**update, "sources": (*own, *classes)})})


def to_draw(config: AdaptConfig) -> int:
    """How many class pictures are missing, by their number alone: whether they are this base's is seen when it is
    opened."""
    prior = _prior(config)
    folders = _root(config, prior).glob(f"{DRAWN}*")
    return max(0, prior.num_class_images - len(given(config)) - max((len(_pictures(x)) for x in folders), default=0))


def given(config: AdaptConfig) -> list[str]:
    """The pictures in ``prior.class_data_dir`` that are not drawn by a run."""
    folder = _prior(config).class_data_dir
    return _pictures(Path(folder).expanduser()) if folder else []


def _prior(config: AdaptConfig) -> Prior:
    if config.prior is None:
        raise ConfigError("prior: the config has none")
    if config.data.streaming:
        raise ConfigError("prior: not with data.streaming, whose rows have no numbers; leave it out")
    if config.conditioning is not None and config.conditioning.name == "image":
        raise ConfigError("prior: class pictures have no second picture, which conditioning asks for; leave prior out")
    return config.prior


def _root(config: AdaptConfig, prior: Prior) -> Path:
    if prior.class_data_dir:
        return Path(prior.class_data_dir).expanduser()
    return Path(config.output_dir) / "class_pictures"


def _of(data: Any, sources: list[Source]) -> Any:
    return data.model_copy(update={"path": None, "mask_column": None, "sources": tuple(sources)})


def _repeated(sources: list[Source], times: float) -> list[Source]:
    return [source.model_copy(update={"repeats": source.repeats * times}) for source in sources]


# --- drawing ---------------------------------------------------------------------------------------------------------


def _about(config: AdaptConfig, prior: Prior, parts: Parts) -> dict[str, Any]:
    """All that decides the pictures."""
    schedule = parts.schedule
    how = [type(schedule.path).__name__, repr(schedule.prediction), schedule.sampler]
    return {
        "base": hashlib.sha256(
            json.dumps([weights_hash(parts.net, parts.vae), text_hash(parts.text), how]).encode()
        ).hexdigest(),
        "class_prompt": prior.class_prompt,
        "num_inference_steps": prior.num_inference_steps,
        "guidance_scale": prior.guidance_scale,
        "size": list(_size(config, parts)),
        "seed": config.seed,
    }


def _size(config: AdaptConfig, parts: Parts) -> tuple[int, int]:
    """That which the base was made for; ``data.resolution`` where it does not say."""
    own = config.data.resolution
    return parts.size if parts.net.config.get("sample_size") else (own, own)


def _firsts(missing: list[int]) -> list[int]:
    return sorted({i // AT_ONCE * AT_ONCE for i in missing})


def _drawn(parts: Parts, prior: Prior, seed: int, numbers: range, size: tuple[int, int]) -> Tensor:
    """(B, H, W, 3) uint8."""
    generators = [torch.Generator().manual_seed(_seed(seed, i)) for i in numbers]
    pictures = generate(
        parts,
        [prior.class_prompt] * len(numbers),
        steps=prior.num_inference_steps,
        guidance_scale=prior.guidance_scale,
        generator=generators,
        height=size[0],
        width=size[1],
    )
    if not pictures.isfinite().all():
        raise ConfigError(f"prior: the base draws what is no number, in {parts.net.dtype}; try base_dtype: fp32")
    return (pictures.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"class picture {seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# --- files -----------------------------------------------------------------------------------------------------------


def _pictures(folder: Path) -> list[str]:
    return list(pictures_in(folder))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _save(file: Path, picture: Tensor) -> None:
    _write(file, lambda out: Image.fromarray(picture.numpy()).save(out, "png"))


def _write(file: Path, fill: Callable[[Any], Any]) -> None:
    """Beside, then renamed: a half-written file is never seen."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            fill(out)
        os.chmod(beside, 0o644)
        os.replace(beside, file)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(beside)
