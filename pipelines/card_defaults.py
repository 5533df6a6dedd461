"""How many steps and how much guidance a model asks for, as its model card says it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger(__name__)
CARD = "README.md"
STEPS, SCALE = "num_inference_steps", "guidance_scale"


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the two ``---`` at the top of a model card; {} where there is none."""
    found = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        content = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def card_defaults(place: str | Path) -> dict[str, Any]:
    """``num_inference_steps`` and ``guidance_scale`` where the card says them.

    The hub's convention: ``inference: {parameters: {num_inference_steps: 20, guidance_scale: 3.0}}``.

    Args:
        place: pipeline folder, folder of an adapter, run, or a file beside whose card it lies.
    """
    folder = Path(place).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    cards = (folder / CARD, folder / "adapter" / CARD, folder / "pipeline" / CARD)
    card = next((file for file in cards if file.is_file()), None)
    if card is None or not Path(place).expanduser().exists():
        return {}
    inference = front_matter(card.read_text(encoding="utf-8", errors="replace")).get("inference")
    parameters = inference.get("parameters") if isinstance(inference, dict) else None
    if not isinstance(parameters, dict):
        return {}
    found = {name: parameters[name] for name in (STEPS, SCALE) if name in parameters}
    for name, value in list(found.items()):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < (1 if name == STEPS else 0) or (name == STEPS and value != int(value)):
            log.warning("%s: inference.parameters.%s is %r and is ignored", card, name, found.pop(name))
    return found


def sampling_defaults(
    model: str | Path, stock: tuple[int, float], adapters: Iterable[str | Path] = ()
) -> tuple[int, float]:
    """Steps and guidance scale of a drawing for which nothing was asked.

    The first adapter whose card says them, else the model's card, else the stock pipeline's.

    Args:
        stock: of the stock pipeline of the model's family (``pipe.defaults[pipe.text.family]``).
        adapters: files or folders of LoRA and new tokens that are loaded.
    """
    chosen = {STEPS: stock[0], SCALE: stock[1]} | card_defaults(model)
    chosen |= next(filter(None, map(card_defaults, adapters)), {})
    return int(chosen[STEPS]), float(chosen[SCALE])
