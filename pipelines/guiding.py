"""Guidance by name: what a user asks for, out of ``ldm.guidance.GUIDANCE``, one kind or several in order.

    guide(denoiser, cond, uncond, 5.0, guidance="apg")
    either = [{"name": "apg", "eta": 0.5}, {"name": "interval", "low": 0.2, "high": 0.8}]
    guide(denoiser, cond, uncond, 5.0, guidance=either)

``classifier_free``, ``apg`` and ``autoguidance`` begin a list; before the others, which change what another kind says,
there is ``classifier_free``. What a kind may be told is its own signature.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.guidance import GUIDANCE, Denoise
from ldm.models.base import Network
from ldm.models.grow import latent_channels

Guidance = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]

FROM_NETWORK = ("classifier_free", "apg")  # ask the network themselves, and so come first
OWN = {
    "denoise",
    "guided",
    "plain",
    "denoiser",
    "path",
    "cond",
    "uncond",
    "one_batch",
}  # known here, and not to be told
OBJECTS = {"weak", "log_prob"}  # the options that are no numbers


def guide(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond | None,
    guidance_scale: float,
    *,
    rescale: float = 0.0,
    guidance: Guidance = "classifier_free",
    one_batch: bool = True,
) -> Denoise:
    """The function ``denoise(x_t, t)`` that a sampler walks with; made anew for each run, as APG remembers its steps.

    Args:
        cond, uncond: B rows each, or one for all; ``uncond`` where anything is led away from.
        guidance_scale: of the first kind (``autoguidance`` may be told its own); at 1 and below ``classifier_free`` and
            ``apg`` ask for ``cond`` alone.
        rescale: of ``classifier_free``.
        guidance: a name in GUIDANCE; or {"name": …, and its options}; or a list of these, the second acting on what the
            first gives and so on. ``interval`` leaves its times outside to the conditional model, which then is all
            that the network is asked for. ``autoguidance`` at the beginning leads the conditional model away from
            ``weak``: a network, ``Parts``, a pipeline or its folder (read at each call), on the same path and
            told the same Cond. ``classifier`` takes a Python function ``log_prob(x_t, t) -> (B,)``.
        one_batch: both halves in one call of the network; False needs half the memory.
    Raises:
        ValueError: an unknown name or option (the nearest is told), an option that is missing or no number, a kind in
            the wrong place, guidance without ``uncond``; see the kinds themselves.
    """
    kinds = listed(guidance)
    plain = partial(denoiser, cond=cond)
    denoise: Denoise = plain
    for i, (name, options) in enumerate(kinds):
        told = {} if i else {"guidance_scale": guidance_scale}
        if name == "classifier_free" and i == 0:
            told["rescale"] = rescale
        elif i == 0 and rescale:
            raise ValueError(f"guidance_rescale is {rescale}, but {name} has none; only classifier_free has")
        options = told | options
        if "weak" in options:
            options["weak"] = partial(_weak(options["weak"], denoiser), cond=cond)
        if name in FROM_NETWORK and uncond is None and guidance_scale > 1:
            raise ValueError(f"guidance_scale {guidance_scale} needs the conditioning to lead away from; give uncond")
        known = {
            "denoise": denoise, "guided": denoise, "plain": plain, "denoiser": denoiser, "path": denoiser.path,
            "cond": cond, "uncond": cond if uncond is None else uncond, "one_batch": one_batch,
        }  # fmt: skip
        wanted = inspect.signature(GUIDANCE[name]).parameters
        missing = [key for key, p in wanted.items() if key not in known | options and p.default is p.empty]
        if missing:
            raise ValueError(f"guidance {name}: {' and '.join(missing)} must be given, as {{'name': {name!r}, …}}")
        denoise = GUIDANCE[name](**{key: value for key, value in known.items() if key in wanted}, **options)
    return denoise


def listed(guidance: Guidance) -> list[tuple[str, dict[str, Any]]]:
    """Names and options in order, checked; the first is one that can begin.

    Raises:
        ValueError: see ``guide``.
    """
    given: list[Any] = list(guidance) if isinstance(guidance, list | tuple) else [guidance]
    kinds = [_named(one) for one in given]
    if not kinds or kinds[0][0] not in (*FROM_NETWORK, "autoguidance"):
        kinds.insert(0, ("classifier_free", {}))
    if kinds[0][0] in FROM_NETWORK and "guidance_scale" in kinds[0][1]:
        raise ValueError(f"guidance {kinds[0][0]}: its guidance_scale is the call's own, and not to be said twice")
    for name, _ in kinds[1:]:
        if name in FROM_NETWORK:
            told = ", ".join(name for name, _ in kinds)
            raise ValueError(f"guidance {told}: {name} asks the network itself, and can only be the first")
    return kinds


def _named(one: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(one, str | Mapping):
        raise ValueError(f"guidance is {one!r}; expected a name, or {{'name': …}} with its options, or a list of these")
    options = {"name": one} if isinstance(one, str) else dict(one)
    name = options.pop("name", None)
    if name not in GUIDANCE:
        raise ValueError(f"guidance {name!r} is not one of {', '.join(GUIDANCE)}{near(str(name), GUIDANCE)}")
    check_options(f"guidance {name}", GUIDANCE[name], options, OWN)
    for key, value in options.items():
        if key not in OBJECTS and (not isinstance(value, int | float) or value != value):  # NaN is not itself
            raise ValueError(f"guidance {name}: {key} is {value!r}, expected a number")
        if key == "log_prob" and not callable(value):
            raise ValueError(f"guidance {name}: log_prob is {value!r}, expected a Python function (x_t, t) -> (B,)")
    return name, options


def _weak(weak: Any, denoiser: Denoiser) -> Denoiser:
    """The denoiser of ``autoguidance``'s weak model; a network alone is taken to be trained as the strong one was."""
    if isinstance(weak, str | Path):
        from .folder import load_parts

        net = denoiser.net
        weak = load_parts(weak)
        if isinstance(net, Network):
            weak.net.to(net.device, net.dtype)
    weak = getattr(weak, "parts", weak)  # of a pipeline
    if isinstance(weak, Network):
        twice = weak.config.get("out_channels") == 2 * latent_channels(weak)
        return Denoiser(weak, denoiser.path, denoiser.prediction, denoiser.time_input, learned_variance=twice)
    found = weak if isinstance(weak, Denoiser) else weak.denoiser() if hasattr(weak, "denoiser") else None
    what = "guidance autoguidance: weak"
    if found is None:
        raise ValueError(f"{what} is {weak!r}; expected a network, Parts, a pipeline or its folder")
    if found.path != denoiser.path:
        raise ValueError(f"{what} walks on {found.path}, the model on {denoiser.path}; both must be on one path")
    return found


def check_options(what: str, function: Callable[..., Any], options: Iterable[str], own: Collection[str]) -> None:
    """Raises ValueError for an option that the function does not take, naming the nearest; ``own`` are not options."""
    takes = [key for key in inspect.signature(function).parameters if key not in own]
    for key in options:
        if key not in takes:
            told = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise ValueError(f"{what} has no option {key!r}; {told}{near(key, takes)}")


def near(key: str, names: Iterable[str]) -> str:
    """The end of a message that names what may have been meant, or nothing."""
    found = difflib.get_close_matches(key, list(names), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
