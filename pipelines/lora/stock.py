"""Diffusers' and peft's form of a LoRA: dotted module names, and the scale in a config beside the tensors.

Diffusers keeps peft's config as JSON in the safetensors header (``lora_adapter_metadata``), its keys under the
component's name; peft in ``adapter_config.json``. A file without it means alpha = rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from .kohya import COMPONENTS, TEXT, kind_of, with_text_model

ADAPTER = "lora_adapter_metadata"
PEFT = "base_model.model."
ENDINGS = {  # a key's end: which tensor of the layer it is
    re.compile(r"\.lora_A(\.\w+)?\.weight$"): "down",
    re.compile(r"\.lora_B(\.\w+)?\.weight$"): "up",
    re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight$"): "down",
    re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight$"): "up",
    re.compile(r"\.lora_magnitude_vector(\.\w+)?(\.weight)?$"): "magnitude",
    re.compile(r"\.lora_down\.weight$"): "down",
    re.compile(r"\.lora_up\.weight$"): "up",
    re.compile(r"\.lora_mid\.weight$"): "mid",
    re.compile(r"\.dora_scale$"): "magnitude",
    re.compile(r"\.alpha$"): "alpha",
}
OTHERS = {  # what is no LoRA, by its keys
    r"\.hada_": "a LoHa", r"\.lokr_": "a LoKr", r"\.oft_": "an OFT", r"\.boft_": "a BOFT", r"\.vera_": "a VeRA",
    r"\.on_input$|\.ia3_l": "an (IA)^3", r"\.[ab][12]\.weight$": "a GLoRA", r"\.diff(_b)?$": "a full difference",
    r"\.[wb]_norm$": "a change of norms", r"\.lora_embedding_": "a LoRA of an embedding",
    r"\.lora_B(\.\w+)?\.bias$": "a LoRA with biases",
}  # fmt: skip
T = TypeVar("T")


def split_key(key: str) -> tuple[str, str] | None:
    """A key's module part, and which tensor of the layer it is: down, up, mid, magnitude or alpha. None: neither."""
    for ending, tensor in ENDINGS.items():
        if match := ending.search(key):
            return key[: match.start()], tensor
    return None


def other_kind(key: str) -> str | None:
    """What else than a LoRA has such a key."""
    return next((name for sign, name in OTHERS.items() if re.search(sign, key)), None)


def stock_place(stem: str, component: str | None = None) -> tuple[str, str]:
    """Component and module of a dotted name, of today's form or an earlier one.

    Args:
        component: that of a name which says nothing of it.
    Raises:
        ValueError: naming the key, if the component can not be told.
    """
    name = stem.removeprefix(PEFT).replace(".processor.", ".")
    head, _, rest = name.partition(".")
    if head in COMPONENTS:
        component, name = head, rest
    name = name.removeprefix("text_model.")
    start, _, last = name.rpartition(".")
    old = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
    component = component or kind_of(name if last != "to_out" else f"{name}.0")
    if component is None and start.endswith("self_attn"):
        component = "text_encoder"
    if component is None:
        raise ValueError(f"{stem}: no component is named ({', '.join(COMPONENTS)}), and no stock class has this module")
    if component in TEXT and start.endswith("self_attn") and last in old:
        return component, f"{start}.{old[last]}"
    if component not in TEXT and last == "to_out":
        name += ".0"
    return component, name


# --- ranks and alphas ------------------------------------------------------------------------------------------------


def read_alphas(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Each module's alpha by a peft config; rslora's (alpha / sqrt(rank)) as the alpha that gives the same scale.

    Raises:
        ValueError: the config has another rank than a module's tensors, or no number where one belongs.
    """
    found = {}
    for module, rank in ranks.items():
        said = _pattern(config.get("rank_pattern"), module, config.get("r", rank))
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        if said != rank:
            raise ValueError(f"{module}: of rank {rank}, but its config says {said}")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"{module}: its config has alpha {alpha!r}, expected a number")
        found[module] = alpha * rank**0.5 if config.get("use_rslora") else float(alpha)
    return found


def _pattern(patterns: Any, module: str, default: T) -> T:
    """The value of the first pattern that a module's name ends in, as peft reads them."""
    for pattern, value in (patterns or {}).items():
        try:
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (module, with_text_model(module))):
                return value
        except re.error as error:
            raise ValueError(f"its config has the pattern {pattern!r}, which is none ({error})") from error
    return default


def adapter_config(layers: Mapping[str, tuple[int, float]], component: str, dora: bool) -> dict[str, Any]:
    """A peft config under which these modules' (rank, alpha) come back, with the fields that matter in it.

    Names of text encoders are without ``text_model.``: peft compares the ends of names.
    """
    rank = Counter(r for r, _ in layers.values()).most_common(1)[0][0]
    alpha = Counter(a for _, a in layers.values()).most_common(1)[0][0]
    head = "" if component in TEXT else "^"  # else proj_out would speak of all that end so
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {head + name: r for name, (r, _) in layers.items() if r != rank},
        "alpha_pattern": {head + name: _number(a) for name, (_, a) in layers.items() if a != alpha},
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": dora,
        "use_rslora": False,
    }


def _number(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


def packed(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Configs of several components as diffusers has them in a file's header."""
    flat = {f"{component}.{key}": value for component, config in configs.items() for key, value in config.items()}
    return json.dumps(flat, indent=2, sort_keys=True)


def unpacked(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """Each component's config out of the header; the key "" where they bear no component. None: there is none.

    Raises:
        ValueError: it is not JSON.
    """
    if not metadata.get(ADAPTER):
        return None
    try:
        flat = json.loads(metadata[ADAPTER])
    except ValueError as error:
        raise ValueError(f"its metadata {ADAPTER} is not JSON ({error})") from error
    if not isinstance(flat, dict):
        raise ValueError(f"its metadata {ADAPTER} is not an object")
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        head, _, rest = key.partition(".")
        head, rest = (head, rest) if head in COMPONENTS else ("", key)
        found.setdefault(head, {})[rest] = value
    return found
