"""What the page is asked for: checked here, whatever a browser sends; written into the PNG, and read back from it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

SEEDS = 2**32
LONGEST = 4000  # characters of a prompt
LONG_PROMPT = "chunk"  # what a page's visitor types counts, to its end


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        factor: pixels per latent; sizes are its multiples.
        samplers, loras: the names that there are.
    """

    factor: int
    samplers: Sequence[str]
    loras: Sequence[str] = ()
    max_side: int = 2048
    max_steps: int = 1000
    max_pictures: int = 8


@dataclass(frozen=True)
class Settings:
    """Of one picture, or of several whose seeds follow one another. Named as the pipeline's call names them.

    Args:
        sampler: None is the one that the folder's scheduler stands for.
        seed: of the first picture.
        weighting: ``(word:1.3)`` in the prompts is read as what counts more.
        loras: name -> weight.
        strength: how far an image is led away from; None where there is none.
        mode: ``text``, ``image`` or ``inpaint``.
    """

    prompt: str
    negative_prompt: str
    sampler: str | None
    num_inference_steps: int
    guidance_scale: float
    seed: int
    width: int
    height: int
    pictures: int = 1
    weighting: bool = False
    loras: Mapping[str, float] | None = None
    strength: float | None = None
    mode: str = "text"

    @classmethod
    def from_form(cls, limits: Limits, *, random_seed: bool = False, **fields: Any) -> Self:
        """Check what a form sent.

        Raises:
            ValueError: naming the field as the page does, and what was expected.
        """
        text = {}
        for name, label in (("prompt", "Prompt"), ("negative_prompt", "Negative prompt")):
            value = fields.get(name) or ""
            if not isinstance(value, str) or len(value) > LONGEST:
                raise ValueError(f"{label}: expected a text of at most {LONGEST} characters")
            text[name] = value.strip()
        if not text["prompt"]:
            raise ValueError("Prompt: it is empty; say what to draw")
        sampler = fields.get("sampler") or None
        if sampler is not None and sampler not in limits.samplers:
            raise ValueError(f"Sampler: {str(sampler)[:40]!r} is not one of {', '.join(limits.samplers)}")
        mode = fields.get("mode", "text")
        return cls(
            **text,
            sampler=sampler,
            num_inference_steps=whole("Steps", fields.get("num_inference_steps"), 1, limits.max_steps),
            guidance_scale=number("Guidance", fields.get("guidance_scale"), 0, 100),
            seed=secrets.randbelow(SEEDS) if random_seed else whole("Seed", fields.get("seed"), 0, SEEDS - 1),
            width=_side("Width", fields.get("width"), limits),
            height=_side("Height", fields.get("height"), limits),
            pictures=whole("Pictures", fields.get("pictures", 1), 1, limits.max_pictures),
            weighting=fields.get("weighting") is True,
            loras=_loras(fields.get("loras") or {}, limits.loras),
            strength=None if mode == "text" else number("Strength", fields.get("strength"), 0.01, 1),
            mode=mode,
        )

    def of_picture(self, i: int) -> Self:
        """Those of picture ``i`` alone: its own seed gives it in any batch."""
        return replace(self, seed=(self.seed + i) % SEEDS, pictures=1)

    def written(self) -> dict[str, Any]:
        """For the PNG, by the names of ``picture_files.Settings``: only what says something."""
        said = {name: value for name, value in asdict(self).items() if value not in (None, "", {}, False)}
        return {**said, "long_prompt": LONG_PROMPT}

    def line(self) -> str:
        """For the caption in the gallery."""
        return f"seed {self.seed}, {self.num_inference_steps} steps, {self.width} × {self.height}"


def from_picture(found: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Fields of ``Settings`` for what a PNG of the page's or of ``ldm sample``'s held; what is not there is left out.

    Raises:
        ValueError: a value that this page would refuse, or a sampler or LoRA that is not here.
    """
    known = {name: found[name] for name in Settings.__dataclass_fields__ if found.get(name) is not None}
    if "seed" in known and (index := found.get("index")) is not None:  # one of several, which follow on one seed
        known |= {"seed": (known["seed"] + whole("Index", index, 0, SEEDS)) % SEEDS, "pictures": 1}
    usual = dict(prompt="x", num_inference_steps=1, guidance_scale=1, seed=0, strength=1)
    usual |= dict(width=limits.factor, height=limits.factor)
    checked = Settings.from_form(limits, **{**usual, **known, "mode": "image"})
    return {name: getattr(checked, name) for name in known if name != "mode"}


def number(label: str, value: Any, low: float, high: float) -> float:
    """``value`` if it is a number in [low, high]. Raises ValueError where it is not."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # nor is NaN between them
        raise ValueError(f"{label}: {str(value)[:20]}, expected a number from {low} to {high}")
    return float(value)


def whole(label: str, value: Any, low: int, high: int) -> int:
    """The same for whole numbers, which browsers may send as 20.0."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not low <= value <= high or value != int(value):
        raise ValueError(f"{label}: {str(value)[:20]}, expected a whole number from {low} to {high}")
    return int(value)


def _side(label: str, value: Any, limits: Limits) -> int:
    f, side = limits.factor, whole(label, value, 1, limits.max_side)
    if side % f:
        raise ValueError(f"{label}: {side}, expected a multiple of {f}; the nearest is {max(f, round(side / f) * f)}")
    return side


def _loras(given: Any, known: Sequence[str]) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ValueError("LoRA: expected names with weights")
    for name in given:
        if name not in known:
            raise ValueError(
                f"LoRA: {str(name)[:60]!r} is not one of {', '.join(known) or 'those here: there is none'}"
            )
    return {name: number(f"Weight of {name}", weight, -4, 4) for name, weight in given.items() if weight}
