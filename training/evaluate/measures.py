"""How near drawn pictures are to real ones, in the features of a network; each figure with its confidence.

Confidence is by the bootstrap (Efron 1979): what was drawn is resampled with replacement, prompts and not pictures
where several were drawn for one, and the real pictures are held fixed. Means and KID have percentile intervals of 95%.
FID has its standard error alone: a resample repeats rows, has less variance for it, and so a larger bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 1000
FEW = 100  # resamples of a Fréchet distance, whose every one takes an eigenvalue problem
NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3.1
BLOCK = 1024  # rows of a matrix of all pairs in memory at a time


class Figure(NamedTuple):
    """A measure and where it may well lie: the ends of its interval of 95%."""

    value: float
    low: float
    high: float


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def multiplicities(groups: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """How often each row stands in each resample, (R, N) float32: groups (N,) are drawn with replacement, as many as
    there are, and their rows come along."""
    _, group = groups.unique(return_inverse=True)
    count = int(group.max()) + 1
    draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(resamples, count).scatter_add_(1, draws, torch.ones(resamples, count))
    return times[:, group]


def percentiles(value: float, replicates: Tensor) -> Figure:
    """``value`` with the middle 95% of its replicates (R,)."""
    tail = (1 - LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(replicates.double(), ends).tolist()
    return Figure(value, low, high)


def mean_figure(values: Tensor, groups: Tensor | None = None, seed: int = 0) -> Figure:
    """The mean of (N,), by rows or by groups (N,) of them."""
    values = values.double()
    times = multiplicities(torch.arange(len(values)) if groups is None else groups, seed=seed)
    return percentiles(values.mean().item(), (times @ values.float()).double() / times.sum(1))


# --- Fréchet distance -------------------------------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """mean (F,) and root (r, F), float64: rootᵀ root is the covariance, unbiased."""

    mean: Tensor
    root: Tensor


def gaussian(x: Tensor) -> Gaussian:
    """Fitted to features (N, F)."""
    x = x.double()
    mean = x.mean(0)
    root = (x - mean) / math.sqrt(len(x) - 1)
    return Gaussian(mean, root if len(root) <= root.shape[1] else torch.linalg.qr(root, mode="r")[1])


def frechet(x: Gaussian, y: Gaussian) -> float:
    """|μx − μy|² + tr(Σx + Σy − 2 √(Σx Σy)) (Heusel et al. 2017, eq. 6). The trace of the root is the sum of singular
    values of root_x root_yᵀ: exact, and no larger than the sets are."""
    cross = torch.linalg.svdvals(x.root @ y.root.T).sum()
    apart = (x.mean - y.mean).square().sum()
    return max(0.0, float(apart + x.root.square().sum() + y.root.square().sum() - 2 * cross))


def fid(x: Tensor, y: Tensor, groups: Tensor, seed: int = 0, resamples: int = FEW) -> Figure:
    """Fréchet distance of features (N, F) of drawings from (M, F) of real pictures, ± 1.96 standard errors.

    It is biased upwards, by about C / N, and the interval does not say so: compare at equal N, and with what held-out
    real pictures get.
    """
    x, real = x.double(), gaussian(y)
    value = frechet(gaussian(x), real)
    seen, squares, found = x @ real.root.T, x.square().sum(1), []  # (N, r), (N,)
    for times in multiplicities(groups, resamples, seed).double():
        n = times.sum()
        mean = times @ x / n
        variance = (times @ squares - n * mean.square().sum()) / (n - 1)
        part = times > 0
        a = (times[part] / (n - 1)).sqrt()[:, None] * (seen[part] - mean @ real.root.T)
        gram = a.T @ a if len(a) > a.shape[1] else a @ a.T
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        found.append((mean - real.mean).square().sum() + variance + real.root.square().sum() - 2 * cross)
    error = 1.96 * float(torch.stack(found).std())
    return Figure(value, max(0.0, value - error), value + error)


def frechet_of_some(x: Tensor, y: Tensor, count: int, repeats: int = 10, seed: int = 0) -> float:
    """The Fréchet distance of ``count`` of the rows of x from y, the mean over some choices of them."""
    generator, real = torch.Generator().manual_seed(seed), gaussian(y)
    choices = [torch.randperm(len(x), generator=generator)[:count] for _ in range(repeats)]
    return math.fsum(frechet(gaussian(x[rows]), real) for rows in choices) / repeats


# --- kernel distance --------------------------------------------------------------------------------------------------


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / F + 1)³ of (N, F) and (M, F) -> (N, M) (Bińkowski et al. 2018, eq. 3)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x: Tensor, y: Tensor, groups: Tensor, seed: int = 0, resamples: int = RESAMPLES // 5) -> Figure:
    """Kernel distance: the unbiased estimate of the squared MMD (Gretton et al. 2012, eq. 3) over all pairs, which is
    what the usual mean over random subsets estimates with more variance.

    In a resample a row is never paired with itself, as often as it may stand there, so that the replicates are
    unbiased too. It may be below 0.
    """
    x, y = x.double(), y.double()
    times = torch.cat([torch.ones(1, len(x)), multiplicities(groups, resamples, seed)]).double()  # (1 + R, N)
    n = times.sum(1)
    across = torch.cat([polynomial(x[rows], y).mean(1) for rows in _blocks(len(x))])
    of_real = _between(y, torch.ones(1, len(y), dtype=torch.float64)) / (len(y) * (len(y) - 1))
    pairs = n.square() - times.square().sum(1)
    found = _between(x, times) / pairs + of_real - 2 * (times @ across) / n
    return percentiles(found[0].item(), found[1:][pairs[1:] > 0])  # of few rows a resample may hold one alone


def _between(x: Tensor, times: Tensor) -> Tensor:
    """Sums of the kernel over all pairs of different rows of (N, F), each as often as ``times`` (R, N) says -> (R,)."""
    total = torch.zeros(len(times), dtype=torch.float64)
    for rows in _blocks(len(x)):
        k = polynomial(x[rows], x)
        k[torch.arange(len(rows)), rows] = 0
        total += (times[:, rows] * (times @ k.T)).sum(1)
    return total


# --- what is covered --------------------------------------------------------------------------------------------------


class Manifolds(NamedTuple):
    """precision: share of drawings within a real picture's ball, which reaches to its k-th nearest real picture.
    recall: share of real pictures within a drawing's ball (Kynkäänniemi et al. 2019, eq. 1 and 2). density: in how
    many real balls a drawing lies, over k, and coverage: share of real balls that hold a drawing (Naeem et al. 2020,
    eq. 5 and 6)."""

    precision: Figure
    recall: Figure
    density: Figure
    coverage: Figure


def manifolds(x: Tensor, y: Tensor, groups: Tensor, k: int = NEIGHBOURS, seed: int = 0) -> Manifolds:
    """Of features (N, F) of drawings and (M, F) of real pictures. Precision and density are resampled over drawings,
    recall and coverage over real pictures: balls between repeated rows would have no size."""
    x, y = x.double(), y.double()
    own, real = _radii(x, k), _radii(y, k)
    inside, covered, recalled = [], torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y), dtype=torch.bool)
    for rows in _blocks(len(x)):
        distance = torch.cdist(x[rows], y)
        held = distance <= real
        inside.append(held.sum(1))
        covered |= held.any(0)
        recalled |= (distance <= own[rows][:, None]).any(0)
    balls = torch.cat(inside).double()
    return Manifolds(
        mean_figure((balls > 0).double(), groups, seed),
        mean_figure(recalled.double(), seed=seed),
        mean_figure(balls / k, groups, seed),
        mean_figure(covered.double(), seed=seed),
    )


def _radii(x: Tensor, k: int) -> Tensor:
    """(N,) from each row to its k-th nearest other one."""
    found = []
    for rows in _blocks(len(x)):
        distance = torch.cdist(x[rows], x)
        distance[torch.arange(len(rows)), rows] = math.inf
        found.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(found)


# --- memorisation -----------------------------------------------------------------------------------------------------


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """1 − cosine of each row of (N, F) to its nearest row of y (M, F), and which that is; both centred on y's mean."""
    centre = y.double().mean(0)
    goal = F.normalize(y.double() - centre, dim=1)
    found = [(F.normalize(x[rows].double() - centre, dim=1) @ goal.T).max(1) for rows in _blocks(len(x))]
    far = (1 - torch.cat([f.values for f in found])).clamp(min=0)  # rounding would put a copy below 0
    return far, torch.cat([f.indices for f in found])


def nearer(drawn: Tensor, held_out: Tensor, groups: Tensor, seed: int = 0, resamples: int = RESAMPLES // 5) -> Figure:
    """The share of pairs in which a drawing is nearer to its nearest training picture than a held-out picture is to
    its own: Mann and Whitney's U over N·M, Meehan et al. 2020's test of copying. 0.5 where the two are alike, 1 where
    every drawing is a copy. Drawings (N,) and held-out pictures (M,) are both resampled; ties count half.
    """
    times = torch.cat([torch.ones(1, len(drawn)), multiplicities(groups, resamples, seed)])
    others = torch.cat([torch.ones(1, len(held_out)), multiplicities(torch.arange(len(held_out)), resamples, seed + 1)])
    total = torch.zeros(len(times), dtype=torch.float64)
    for rows in _blocks(len(drawn)):
        wins = torch.sign(held_out[None] - drawn[rows][:, None]).float() / 2 + 0.5  # (b, M)
        total += (times[:, rows] * (others @ wins.T)).sum(1)
    found = total / (times.sum(1) * others.sum(1))
    return percentiles(found[0].item(), found[1:])


# --- speed ------------------------------------------------------------------------------------------------------------


def throughput(pictures: Tensor, seconds: Tensor, seed: int = 0) -> Figure:
    """Pictures per second of batches (N,), resampled by batches."""
    times = multiplicities(torch.arange(len(pictures)), seed=seed).double()
    pictures, seconds = pictures.double(), seconds.double()
    return percentiles(float(pictures.sum() / seconds.sum()), (times @ pictures) / (times @ seconds))


def _blocks(count: int) -> Iterator[Tensor]:
    for start in range(0, count, BLOCK):
        yield torch.arange(start, min(start + BLOCK, count))
