"""LoRA inside live networks, ours and transformers' text encoders, by peft (Hu et al. 2021).

Layers bear the names that files have: those of the stock classes, of a text encoder without ``text_model.``.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from torch import Tensor, nn

from ldm.models.base import acts
from ldm.models.new_tokens import GrownEmbedding
from ldm.reuse import forget

from .files import Component, Layer
from .targets import (
    FROM_BASE,
    INITS,
    LoraSettings,
    by_pattern,
    check_layer,
    is_quantized,
    layers_of,
    lora_layers,
    plain,
    shape_of,
    target_names,
)


@dataclass
class _State:
    """Of a network with LoRA in it."""

    weights: dict[str, float]  # of the active adapters, in the order in which they act
    thawed: list[nn.Parameter]  # what trained before


# --- in ----------------------------------------------------------------------------------------------------------


def add_lora(module: nn.Module, settings: LoraSettings, name: str = "default") -> None:
    """Wrap the layers that ``settings`` name: from now on only the LoRA, in float32 at least, asks for gradients.

    Raises:
        ValueError: the name is taken; targets or patterns that match nothing; a rank above the smaller side of a
            layer's matrix; an init that a layer does not take. Nothing has changed then.
    """
    _check_name(module, name)
    layers: dict[str, Any] = {plain(live): (live, layer) for live, layer in layers_of(module).items()}
    names = target_names(module, settings.targets)
    ranks, alphas = by_pattern("rank", settings, names), by_pattern("alpha", settings, names)
    plan: dict[str, tuple[int, float]] = {}
    for target in names:
        live, layer = layers[target]
        rank = ranks.get(target, settings.rank)
        plan[live] = rank, alphas.get(target, settings.alpha or rank)
        check_layer(target, layer, rank, settings)
    kept: dict[str, Tensor] = {}
    if settings.init in FROM_BASE:
        kept = {live: _copy(layer.weight) for live, layer in layers.values() if live in plan}
    _inject(
        module, name, plan, lora_dropout=settings.dropout, use_rslora=settings.rslora, use_dora=settings.dora,
        init_lora_weights=INITS[settings.init],
    )  # fmt: skip
    cast_adapter_dtype(module, name)  # peft gave it the base's, and what trains is float32
    for live, weight in kept.items():
        layer: Any = module.get_submodule(live)
        start = (layer.lora_A[name].weight, layer.lora_B[name].weight)
        layer.lora_starts = {**getattr(layer, "lora_starts", {}), name: tuple(_copy(p) for p in start)}
        layer.lora_base = getattr(layer, "lora_base", weight)
    _activate(module, name, 1.0, trainable=True)


def load_lora(
    module: nn.Module,
    component: Component,
    name: str = "default",
    *,
    weight: float = 1.0,
    trainable: bool = False,
    dropout: float = 0.0,
) -> None:
    """Put a finished LoRA into a network, beside those that are there. Draws no random numbers.

    Args:
        weight: what its change counts.
        trainable: go on training it, in float32 at least; else it has the network's type and asks for no gradient.
    Raises:
        ValueError: the name is taken; layers that the network lacks, or has in another shape. Nothing has changed then.
    """
    _check_name(module, name)
    found = check_lora(module, component)
    for dora in (False, True):
        part = {live: layer for live, layer in found.items() if (layer.magnitude is not None) == dora}
        if part:
            plan = {live: (layer.rank, layer.alpha) for live, layer in part.items()}
            _inject(module, name, plan, meta=True, use_dora=dora, lora_dropout=dropout, init_lora_weights=False)
    for live, layer in found.items():
        wrapped: Any = module.get_submodule(live)
        base = wrapped.get_base_layer().weight
        dtype = base.dtype if base.dtype.is_floating_point else torch.float32
        dtype = torch.promote_types(dtype, torch.float32) if trainable else dtype
        values = [(wrapped.lora_A[name], layer.down), (wrapped.lora_B[name], layer.up)]
        if layer.magnitude is not None:
            shape = (-1,) if layer.down.ndim == 2 else (1, -1, 1, 1)
            values.append((wrapped.lora_magnitude_vector[name], layer.magnitude.reshape(shape)))
        for owner, value in values:
            owner.weight = nn.Parameter(value.detach().to(base.device, dtype, copy=True), requires_grad=trainable)
    _activate(module, name, weight, trainable)


def check_lora(module: nn.Module, component: Component) -> dict[str, Layer]:
    """The layers by their names in this network, in the shapes that it has them in.

    Raises:
        ValueError: none or not all of them are in the network, or with other weights.
    """
    network, layers = type(module).__name__, {plain(live): (live, layer) for live, layer in layers_of(module).items()}
    left = [name for name in component if plain(name) not in layers]
    if left or not component:
        some = f"{len(left)} of its {len(component)} layers are not" if component else "it holds no layer that is"
        near = difflib.get_close_matches(left[0], layers, n=1, cutoff=0.0) if left else []
        first = (
            f": {', '.join(left[:3])}{' …' if len(left) > 3 else ''}; nearest to the first is {near[0]}" if near else ""
        )
        raise ValueError(f"a LoRA for another model? {some} in this {network}{first}")
    found: dict[str, Layer] = {}
    for name, layer in component.items():
        live, base = layers[plain(name)]
        shape, given = shape_of(base), (layer.up.shape[0], *layer.down.shape[1:])
        if shape != given and [n for n in shape if n > 1] == [n for n in given if n > 1]:  # 1 x 1: both forms are about
            ones = (1,) * (len(shape) - 2)
            down, up = layer.down.reshape(layer.rank, *shape[1:]), layer.up.reshape(shape[0], layer.rank, *ones)
            layer, given = replace(layer, down=down, up=up), shape
        if shape != given:
            raise ValueError(f"a LoRA for another model? {name}: it changes {given}, this {network} has {shape}")
        found[live] = layer
    return found


def _check_name(module: nn.Module, name: str) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter name {name!r}: expected a word without dots that is none of torch's own")
    if name in adapters(module):
        raise ValueError(
            f"adapter name {name!r} is taken in this {type(module).__name__}; choose another, or unload it"
        )
    if _is_fused(module):
        raise ValueError(f"a LoRA is fused into this {type(module).__name__}; unfuse it before another one comes")


def _inject(
    module: nn.Module, name: str, plan: Mapping[str, tuple[int, float]], *, meta: bool = False, **options: Any
) -> None:
    """peft's layers around those of ``plan``: of each name its rank and alpha."""
    if not hasattr(module, "lora_state"):
        module.lora_state = _State({}, [])  # type: ignore[assignment]
    trains = [(p, p.requires_grad) for p in module.parameters()]
    groups: list[dict[Any, list[str]]] = [{}, {}]  # by rank, by alpha: few patterns, which peft tries on every name
    for live, values in plan.items():
        for group, value in zip(groups, values, strict=True):
            group.setdefault(value, []).append(re.escape(live))
    ranks, alphas = ({f"^({'|'.join(names)})": value for value, names in group.items()} for group in groups)
    config = LoraConfig(target_modules="|".join(map(re.escape, plan)), **options)
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        inject_adapter_in_model(config, module, name, low_cpu_mem_usage=meta)
    for parameter, needed in trains:  # peft would freeze all: what is to be frozen is said in _activate
        parameter.requires_grad_(needed)
    for live in plan:
        layer: Any = module.get_submodule(live)
        layer.train(layer.get_base_layer().training)


# --- what there is -----------------------------------------------------------------------------------------------


def adapters(module: nn.Module) -> list[str]:
    """Names of the LoRA in the network, active or not."""
    return list(getattr(module, "peft_config", {})) if hasattr(module, "lora_state") else []


def active_adapters(module: nn.Module) -> dict[str, float]:
    """Names and weights of those that act."""
    state: Any = getattr(module, "lora_state", None)
    return dict(state.weights) if state else {}


def lora_of(module: nn.Module, name: str = "default") -> Component:
    """A copy, on the CPU, of what a LoRA changes in the ORIGINAL network.

    One that began with a part of the weights (pissa, olora) comes with that part subtracted, at twice its rank.

    Raises:
        ValueError: there is no LoRA of this name.
    """
    _check_known(module, [name])
    found: Component = {}
    for live, layer in lora_layers(module):
        if name not in layer.lora_A:
            continue
        down, up = _copy(layer.lora_A[name].weight), _copy(layer.lora_B[name].weight)
        alpha = layer.lora_alpha[name] * (sqrt(layer.r[name]) if layer.use_rslora[name] else 1)
        if start := getattr(layer, "lora_starts", {}).get(name):
            down, up, alpha = torch.cat([down, -start[0]]), torch.cat([up, start[1]], dim=1), 2 * alpha
        lengths = None
        if name in layer.lora_magnitude_vector:
            lengths = _copy(layer.lora_magnitude_vector[name].weight.flatten())
        found[plain(live)] = Layer(down, up, float(alpha), lengths)
    return found


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


# --- weights, fusing, out ----------------------------------------------------------------------------------------


def set_weights(module: nn.Module, weights: Mapping[str, float]) -> None:
    """These adapters act, in this order and with these weights, and no other; what trains is left as it is.

    Raises:
        ValueError: an unknown name; a LoRA is fused; or one that holds a part of the base's weights (pissa, olora)
            would not count 1.
    """
    _check_known(module, weights)
    if _is_fused(module):
        raise ValueError("a LoRA is fused into the weights; unfuse it before other weights are set")
    for name in {name for _, layer in lora_layers(module) for name in getattr(layer, "lora_starts", {})}:
        if weights.get(name) != 1:
            raise ValueError(
                f"adapter {name!r} holds a part of the network's weights (pissa or olora), so it counts 1; to weigh "
                "it, write it to a file and load that"
            )
    if adapters(module):
        module.lora_state.weights = {name: float(weight) for name, weight in weights.items()}  # type: ignore[union-attr]
        _apply(module)


def _activate(module: nn.Module, name: str, weight: float, trainable: bool) -> None:
    state: Any = module.lora_state
    state.weights[name] = weight
    if trainable:  # it, others that do, and new words: nothing else
        own = {id(p) for _, layer in lora_layers(module) for p in layer.parameters()}
        own -= {id(p) for _, layer in lora_layers(module) for p in layer.get_base_layer().parameters()}
        own |= {id(p) for part in module.modules() if isinstance(part, GrownEmbedding) for p in part.new}
        frozen = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
        state.thawed += frozen
        for parameter in frozen:
            parameter.requires_grad_(False)
    for _, layer in lora_layers(module):
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            if name in part:
                part[name].requires_grad_(trainable)
    _apply(module)


def _apply(module: nn.Module) -> None:
    forget()  # a callback may do this while pictures are drawn
    weights = active_adapters(module)
    for _, layer in lora_layers(module):
        trains = [(p, p.requires_grad) for p in layer.parameters()]
        layer.set_adapter(list(weights))  # switches gradients on and off too
        for name, weight in weights.items():
            layer.set_scale(name, weight)
        for parameter, needed in trains:
            parameter.requires_grad_(needed)


def fuse(module: nn.Module, names: Sequence[str] | None = None, *, scale: float = 1.0) -> None:
    """Add the active adapters to the weights themselves, which are kept beside, on the CPU.

    Args:
        names: those that act; None: all that do.
        scale: of their changes, beside their own weights.
    Raises:
        ValueError: unknown names, or others than act; a quantized layer; it is done already; a LoRA with NaN or
            infinity in it.
    """
    active = active_adapters(module)
    names = list(active) if names is None else list(names)
    _check_known(module, names)
    if _is_fused(module):
        raise ValueError("a LoRA is fused into the weights already; unfuse it first")
    if set(names) != set(active):
        act = ", ".join(active) or "none"
        raise ValueError(f"fuse of {', '.join(names)}: active are {act}; say which by their weights first")
    forget()
    wrapped = [(live, layer, [n for n in active if n in layer.lora_A]) for live, layer in lora_layers(module)]
    for live, layer, here in wrapped:
        if is_quantized(layer.get_base_layer()):
            raise ValueError(f"{live} is quantized: no LoRA can be added to its weight; load the model without")
        if scale != 1 and any(n in getattr(layer, "lora_starts", {}) for n in here):
            raise ValueError("an adapter that holds a part of the network's weights (pissa or olora) counts 1")
    try:
        for _, layer, here in wrapped:
            if here:
                layer.lora_unfused = layer.get_base_layer().weight.detach().to("cpu", copy=True)
                layer.scale_layer(scale)
                layer.merge(safe_merge=True, adapter_names=here)
    except ValueError:
        unfuse(module)
        raise


def unfuse(module: nn.Module) -> None:
    """Undo ``fuse``, bit for bit."""
    for _, layer in lora_layers(module):
        if hasattr(layer, "lora_unfused"):
            layer.get_base_layer().weight.data.copy_(layer.lora_unfused)
            layer.merged_adapters.clear()
            layer._caches.clear()  # of DoRA's merging
            del layer.lora_unfused
    if adapters(module):
        _apply(module)  # without the scale of fusing


def unload(module: nn.Module, *, keep_fused: bool = False) -> None:
    """Take every LoRA out: the network is bit for bit what it was, and asks for the gradients that it asked for.

    Args:
        keep_fused: leave in the weights what was fused into them.
    """
    if not hasattr(module, "lora_state"):
        return
    forget()
    kept = keep_fused and _is_fused(module)
    if not kept:
        unfuse(module)
    for live, layer in lora_layers(module):
        base = layer.get_base_layer()
        if not kept and hasattr(layer, "lora_base"):
            base.weight.data.copy_(layer.lora_base)
        module.set_submodule(live, base)
    state: Any = module.lora_state
    for parameter in state.thawed:
        parameter.requires_grad_(True)
    del module.lora_state, module.peft_config


@contextmanager
def bare(module: nn.Module, what: str) -> Iterator[None]:
    """For the time of saving, the network without the layers around its own.

    Raises:
        ValueError: a LoRA acts that is not fused: its change would be lost.
    """
    wrapped = lora_layers(module)
    if any(acts(layer) for _, layer in wrapped):
        names = ", ".join(dict.fromkeys(name for _, layer in wrapped for name in layer.active_adapters))
        raise ValueError(
            f"{what}: a LoRA acts in it ({names}) that its weights do not hold; fuse_lora() first, or write the LoRA "
            "alone by save_lora_weights()"
        )
    for live, layer in wrapped:
        module.set_submodule(live, layer.get_base_layer())
    try:
        yield
    finally:
        for live, layer in wrapped:
            module.set_submodule(live, layer)


def _is_fused(module: nn.Module) -> bool:
    return any(layer.merged_adapters for _, layer in lora_layers(module))


def _check_known(module: nn.Module, names: Iterable[str]) -> None:
    known = adapters(module)
    for name in names:
        if name not in known:
            raise ValueError(
                f"no adapter {name!r} in this {type(module).__name__}; there is {', '.join(known) or 'none'}"
            )
