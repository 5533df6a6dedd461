"""All that a run needs to go on, gathered from the processes and handed back to them."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from . import checkpoint, sharded
from .checkpoint import CheckpointError, Files
from .optim import named_parameters
from .sharded import bare, kept
from .tensor_files import Stored, read

if TYPE_CHECKING:
    from .loop import Player

log = logging.getLogger(__name__)
FORMAT = 2  # of what a checkpoint holds


@dataclass
class Progress:
    """Where a run stands. ``inputs``: hashes of what it builds on; the rest is this process's own."""

    inputs: dict[str, str]
    images: int = 0
    steps: int = 0
    pieces: int = 1  # parts that a micro-batch is computed in, after a lack of memory
    best: list[float] | None = None  # the best held-out measure and its image
    watch: dict[str, Any] = field(default_factory=dict)  # Watchman.state()
    feed: Any = None  # Feed.state()
    window: dict[str, Tensor] = field(default_factory=dict)  # Window.sums


def needed(players: Sequence[Player]) -> list[str]:
    """The tensor files without which a run cannot go on."""
    return ["rng", "window", *(f"{p.name}{end}" for p in players for end in ("", "_optimizer", "_ema"))]


def gathered(
    players: Sequence[Player], progress: Progress, clock: dict[str, Any], accelerator: Accelerator
) -> tuple[Files, dict[str, Any]]:
    """Tensors by file and the rest as JSON, for ``checkpoint.save``; all processes call this.

    Args:
        clock: what decides which row an image shows; a resumed run must have the same.
    """
    window = {k: v.cpu() for k, v in progress.window.items()}
    own = {"rng": random_state(accelerator.device), "window": window, "feed": progress.feed}
    everyone = gather_object([own]) if accelerator.num_processes > 1 else [own]
    files: Files = {
        name: {f"{rank}.{k}": v for rank, one in enumerate(everyone) for k, v in one[name].items()}
        for name in ("rng", "window")
    }
    for player in players:
        named = named_parameters(bare(player.module).named_parameters())
        files[player.name] = {name: kept(p) for name, p in named.items()}
        files[f"{player.name}_optimizer"] = player.optimizer.tensors()
        files[f"{player.name}_ema"] = player.ema.tensors()
    state = {
        "format": FORMAT,
        "images": progress.images,
        "steps": progress.steps,
        "pieces": progress.pieces,
        "best": progress.best,
        "watch": progress.watch,
        "optimizers": {player.name: player.optimizer.state() for player in players},
        "inputs": progress.inputs,
        "clock": clock,
        "world": accelerator.num_processes,
        "feeds": [one["feed"] for one in everyone],
    }
    return files, state


def restored(
    players: Sequence[Player],
    folder: Path | None,
    inputs: dict[str, str],
    clock: dict[str, Any],
    accelerator: Accelerator,
    seed: int,
) -> Progress:
    """Puts a checkpoint into the players and the generators of random numbers; None: a run that begins.

    Raises:
        CheckpointError: it is damaged, or of another network, other inputs or other rows; a stream is shared out among
            another number of processes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if folder is None:
        if rank:  # the first process draws as if it were alone
            torch.manual_seed(_mixed(seed, 0, rank))
        random.seed(_mixed(seed, 0, rank))
        np.random.seed(_mixed(seed, 0, rank) % 2**32)
        return Progress(inputs)
    files, state = checkpoint.opened(folder, needed(players))
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: was written by another version of this package (format {state.get('format', 1)}, here "
            f"{FORMAT}); train on with that version, or choose another output_dir"
        )
    _fits(folder, state, inputs, clock)
    feed = _feed(folder, state, rank, world)
    for player in players:
        _fill(player, folder, files, state["optimizers"][player.name])
    ranks = range(state["world"])
    own = {name: [_of_rank(files[name], r) for r in ranks] for name in ("rng", "window")}
    if rank < state["world"]:
        set_random_state(own["rng"][rank], accelerator.device)
    else:
        torch.manual_seed(_mixed(seed, state["images"], rank))
    log.info("going on from %s", folder)
    return Progress(
        inputs,
        state["images"],
        state["steps"],
        state["pieces"],
        state["best"],
        state["watch"],
        feed,
        own["window"][rank] if world == state["world"] else _shared_out(own["window"], world),
    )


def _fits(folder: Path, state: Mapping[str, Any], inputs: Mapping[str, str], clock: Mapping[str, Any]) -> None:
    changed = [k for k in inputs if state["inputs"].get(k) != inputs[k]]
    if changed:
        raise CheckpointError(
            f"{folder}: was trained from another {changed[0]} than the one there now; choose another output_dir, "
            f"or delete {folder.parent.parent} to train anew"
        )
    for key, value in clock.items():
        if state["clock"].get(key) != value:
            raise CheckpointError(
                f"{folder}: {key} was {state['clock'].get(key)} and is {value} now: other rows would be shown, some "
                "twice; go on with the config that it was made with, or choose another output_dir"
            )


def _feed(folder: Path, state: Mapping[str, Any], rank: int, world: int) -> Any:
    """Where this process's stream stands. Where all stood at the same place, any number of them goes on from it."""
    feeds = [feed for feed in state["feeds"] if feed]
    if not feeds:
        return None
    places = [place for feed in feeds for place in feed["states"]]
    if all(feed["turn"] == 0 for feed in feeds) and all(place == places[0] for place in places):
        return {"workers": None, "turn": 0, "states": places[:1]}
    readers = [x for place in places if place for x in (place if isinstance(place, list) else [place])]
    together = {"workers": None, "turn": 0, "states": [readers]}  # RowStream merges the readers' lanes
    if not all("places" in x for x in readers):
        together = None
    if state["world"] != world and together is not None:
        return together
    if state["world"] != world:
        raise CheckpointError(
            f"{folder}: its stream was read by {state['world']} processes with workers at different places, and goes "
            f"on with as many only; {world} run"
        )
    return feeds[rank] if together is None else {**feeds[rank], "together": together}


def _fill(player: Player, folder: Path, files: Mapping[str, Stored], state: dict[str, Any]) -> None:
    own = named_parameters(bare(player.module).named_parameters())
    there = {(name, x.shape) for name, x in files[player.name].items()}
    differing = sorted(there ^ {(name, sharded.shape(p)) for name, p in own.items()})
    if differing:
        raise CheckpointError(f"{folder}: {player.name}.safetensors does not fit, first: {differing[0][0]}")
    for name, parameter in own.items():
        sharded.copy_into(parameter, files[player.name][name])
    try:
        player.optimizer.load(files[f"{player.name}_optimizer"], state)
        player.ema.load(files[f"{player.name}_ema"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: optimizer or average of {player.name} do not fit ({error})") from error


def _shared_out(windows: Sequence[Mapping[str, Tensor]], world: int) -> dict[str, Tensor]:
    """The sums of a line of the log, of another number of processes: the same totals."""
    keys = dict.fromkeys(k for window in windows for k in window)
    return {k: torch.stack([w[k] for w in windows if k in w]).sum(0) / world for k in keys}


# --- random numbers --------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch on CPU and GPU, Python and NumPy, as tensors."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    assert version == 3 and name == "MT19937"
    state = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(numbers),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.append(keys.astype(np.int64), [position, has_gauss])),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of ``random_state``; a GPU's is left as it is where the checkpoint was made without one."""
    torch.set_rng_state(state["cpu"])
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _mixed(seed: int, images: int, rank: int) -> int:
    return (seed * 1_000_003 + images * 4099 + rank) % 2**63


def _of_rank(flat: Stored, rank: int) -> dict[str, Tensor]:
    prefix = f"{rank}."
    return {k.removeprefix(prefix): read(v) for k, v in flat.items() if k.startswith(prefix)}
