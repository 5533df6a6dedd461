"""Averages of any width, put together after the run (Karras et al. 2024, "Analyzing and Improving the Training Dynamics
of Diffusion Models", arXiv:2312.02696, §3 and appendix C).

While it trains, a run stores averages of a few widths at many times. An average of another width is the combination of
them whose weighting of the past comes nearest to it, in least squares. Weightings are powers of time,

    p_{T,γ}(t) = (γ + 1) t^γ / T^{γ+1} on [0, T],

and their width is told as σ_rel, their standard deviation as a share of T. Times are counted in images.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoint import replace_folder
from .fit import ConfigError

if TYPE_CHECKING:
    from .schema import AutoencoderConfig

NAME = re.compile(r"images_(\d+)_sigma_rel_([\d.e-]+)\.safetensors")
WIDEST = 12**-0.5  # σ_rel at γ = 0: the plain mean


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The power whose weighting has this standard deviation, σ_rel = √(γ+1) / ((γ+2) √(γ+3)): the largest root of
    γ³ + 7γ² + (16 − σ_rel⁻²) γ + (12 − σ_rel⁻²) = 0.

    Raises:
        ValueError: not in (0, 0.288], where a power that is not negative has it.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel {sigma_rel}: expected above 0 and at most {WIDEST:.3f}, the plain mean's")
    s = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - s, 12 - s]).real.max()))


def gamma_to_sigma_rel(gamma: float) -> float:
    return ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2)


def inner_products(
    ta: NDArray[np.float64], ga: NDArray[np.float64], tb: NDArray[np.float64], gb: NDArray[np.float64]
) -> NDArray[np.float64]:
    """∫ p_{ta,γa} p_{tb,γb} dt of every pair, (A, B). With m = min(ta, tb):
    (γa+1)(γb+1)/(γa+γb+1) · (m/ta)^γa (m/tb)^γb · m/(ta tb), whose ratios neither over- nor underflow to harm."""
    ta, ga, tb, gb = ta[:, None], ga[:, None], tb[None], gb[None]
    m = np.minimum(ta, tb)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (m / ta) ** ga * (m / tb) ** gb * m / (ta * tb)


def solve_weights(times: NDArray, gammas: NDArray, time: float, gamma: float) -> NDArray[np.float64]:
    """What to multiply the averages stored at ``times`` of powers ``gammas`` by, (N,), so that their sum comes nearest
    to the average of power ``gamma`` at ``time``.

    The paper's least squares, min ‖Σ x_i p_i − p‖², under Σ x_i = 1: weights that have not moved stay what they are.
    """
    t, g = np.asarray(times, np.float64) / time, np.asarray(gammas, np.float64)  # in units of the time asked for
    one, n = np.ones(1), len(t)
    system = np.ones((n + 1, n + 1))
    system[:n, :n], system[n, n] = inner_products(t, g, t, g), 0
    right = np.append(inner_products(t, g, one, gamma * one)[:, 0], 1.0)
    size = 1 / np.sqrt(np.append(np.diag(system)[:n], 1.0))  # to unit diagonal: fewer digits are lost
    solved = np.linalg.lstsq(system * size[:, None] * size, right * size, rcond=None)[0]
    return (solved * size)[:n]


# --- snapshots -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    file: Path
    images: int  # seen by the run
    time: float  # seen by this player
    sigma_rel: float


def snapshot_name(images: int, sigma_rel: float) -> str:
    return f"images_{images:09d}_sigma_rel_{sigma_rel!r}.safetensors"


def forget_after(folder: Path, images: int) -> None:
    """Delete snapshots of later than ``images``, and half-written ones."""
    for file in folder.glob("images_*"):
        name = NAME.fullmatch(file.name)
        if file.suffix == ".partial" or (name and int(name[1]) > images):
            file.unlink()


def snapshots(folder: Path) -> list[Snapshot]:
    """Those stored in RUN/ema/PLAYER, oldest first.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    found = []
    for file in sorted(folder.glob("images_*.safetensors")):
        if NAME.fullmatch(file.name):
            try:
                with safe_open(file, framework="pt") as handle:
                    about = handle.metadata()
                found.append(Snapshot(file, int(about["images"]), float(about["time"]), float(about["sigma_rel"])))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{file}: no snapshot that can be read ({error}); delete it to do without") from error
    if not found:
        raise ConfigError(f"{folder}: no snapshots in it; train with ema.snapshot_every set")
    return sorted(found, key=lambda s: (s.time, s.sigma_rel))


def reconstruct(folder: Path, sigma_rel: float, images: int | None = None) -> dict[str, Tensor]:
    """The weights' average of width ``sigma_rel``, by the parameters' names, float32.

    One tensor at a time is summed over the files, in float64.

    Args:
        folder: RUN/ema/PLAYER.
        images: at which time of the run; the last snapshot's if None.
    Raises:
        ValueError: no such width.
        ConfigError: no snapshots, none of this time or before, or a damaged one.
    """
    gamma = sigma_rel_to_gamma(sigma_rel)
    stored = snapshots(folder)
    if images is None:
        time = stored[-1].time
    else:
        start = stored[0].images - stored[0].time
        time = images - start
        stored = [s for s in stored if s.time <= time]
        if not stored or stored[-1].time < time:
            there = sorted({s.images for s in snapshots(folder)})
            raise ConfigError(f"{folder}: no snapshot at {images} images; there are {', '.join(map(str, there))}")
    gammas = np.array([sigma_rel_to_gamma(s.sigma_rel) for s in stored])
    weights = solve_weights(np.array([s.time for s in stored]), gammas, time, gamma)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(s.file, framework="pt")) for s in stored]
        names = list(files[-1].keys())
        for s, file in zip(stored, files, strict=True):
            if set(file.keys()) != set(names):
                raise ConfigError(f"{s.file}: other weights than in {stored[-1].file.name}; delete the odd one")
        result = {}
        for name in names:
            total = torch.zeros((), dtype=torch.float64)
            for weight, file in zip(weights.tolist(), files, strict=True):
                total = total + weight * file.get_tensor(name).double()
            result[name] = total.float()
    return result


# --- a pipeline of another width -------------------------------------------------------------------------------------


def ema_pipeline(run: Path, sigma_rel: float, out: Path, images: int | None = None) -> Path:
    """Write RUN/pipeline once more, as ``out``, with the trained network's weights averaged over width ``sigma_rel``.

    An autoencoder's latents are measured anew, as its own export does, for which its data are opened.

    Args:
        images: at which time of the run; the last snapshot's if None.
    Returns:
        ``out``.
    Raises:
        ValueError: no such width.
        ConfigError: no run with snapshots and a pipeline, or ``out`` is there already.
    """
    from .config import load
    from .schema import AutoencoderConfig

    if not (run / "config.yaml").is_file() or not (run / "pipeline").is_dir():
        raise ConfigError(f"{run}: expected the folder of a run that has written its pipeline")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; choose another folder")
    players = sorted(p for p in (run / "ema").glob("*") if p.is_dir())
    if len(players) != 1:
        raise ConfigError(f"{run / 'ema'}: no snapshots in it; train with ema.snapshot_every set")
    weights = reconstruct(players[0], sigma_rel, images)
    config = load(run / "config.yaml")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        made = Path(beside) / "pipeline"
        if isinstance(config, AutoencoderConfig):
            _export_autoencoder(config, weights, Path(beside))
        else:
            shutil.copytree(run / "pipeline", made)
            replace_weights(made, weights)
        replace_folder(made, out)
    return out


def replace_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Put weights into the one component of a pipeline folder that has all of these names and shapes, whether bare or
    behind the wrapper's name that all of ours share. The files keep their precision.

    Raises:
        ConfigError: no component has them.
    """
    wrapper = next(iter(weights)).partition(".")[0] + "."
    bare = {name.removeprefix(wrapper): x for name, x in weights.items()}
    ours = [dict(weights), bare] if all(name.startswith(wrapper) for name in weights) else [dict(weights)]
    for place in sorted({file.parent for file in folder.rglob("*.safetensors")}):
        files = sorted(place.glob("*.safetensors"))  # one, or shards
        there = {name: shape for file in files for name, shape in _shapes(file).items()}
        for new in ours:
            if all(there.get(name) == tuple(x.shape) for name, x in new.items()):
                for file in files:
                    flat = load_file(file)
                    flat |= {name: new[name].to(flat[name].dtype) for name in flat.keys() & new.keys()}
                    save_file(flat, file, metadata={"format": "pt"})
                return
    raise ConfigError(f"{folder}: no part of it has the weights of the snapshots, as {next(iter(weights))}")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as handle:
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118


def _export_autoencoder(config: AutoencoderConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    from accelerate import Accelerator

    from .run import open_data
    from .tasks.autoencoder import AutoencoderTask

    alone = config.loss.model_copy(update={"perceptual": None, "gan_weight": 0.0})
    config = config.model_copy(update={"loss": alone, "ema_decay": 0.0})
    task = AutoencoderTask(config, *open_data(config), folder, Accelerator())
    with torch.no_grad():
        for name, p in task.vae.named_parameters():
            p.copy_(weights[name])
    task.export()
