"""The measures against closed forms and independent implementations."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from training.evaluate import measures as m


def normal(n: int, f: int, seed: int = 0) -> Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(x: Tensor) -> Tensor:
    return torch.arange(len(x))


def with_moments(mean: Tensor, covariance: Tensor, n: int, seed: int) -> Tensor:
    """(N, F) whose own mean and unbiased covariance are exactly these."""
    z = normal(n, len(mean), seed)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / (n - 1)), z.T, upper=False).T
    return mean + z @ torch.linalg.cholesky(covariance).T


# ---------------------------------------------------------------- Fréchet distance


def by_sqrtm(x: Tensor, y: Tensor) -> float:
    """Heusel et al.'s formula as it is usually programmed."""
    a, b = x.double().numpy(), y.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.asarray(scipy.linalg.sqrtm(s @ t)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


@pytest.mark.parametrize("n", [5, 40, 300])  # fewer than features: covariances without full rank
def test_a_set_against_itself_is_0(n: int):
    x = normal(n, 24) * 3 + 2
    assert m.frechet(m.gaussian(x), m.gaussian(x)) == pytest.approx(0, abs=1e-10)
    assert m.fid(x, x, rows(x), resamples=5).value == pytest.approx(0, abs=1e-10)


def test_gaussians_of_known_distance():
    """Diagonal covariances commute: |μ − ν|² + Σ (s − t)². And 2 x 2 with tr √(ST) = √(tr ST + 2 √det ST)."""
    mean, other = torch.tensor([1.0, -2, 0.5, 0]).double(), torch.tensor([0.0, 1, 0.5, 3]).double()
    s, t = torch.tensor([1.0, 2, 0.5, 3]).double(), torch.tensor([2.0, 1, 0.25, 3]).double()
    x = with_moments(mean, torch.diag(s**2), 50, 1)
    y = with_moments(other, torch.diag(t**2), 70, 2)
    expected = (mean - other).square().sum() + (s - t).square().sum()
    assert m.frechet(m.gaussian(x), m.gaussian(y)) == pytest.approx(expected.item(), rel=1e-10)
    a = torch.tensor([[2.0, 0.8], [0.8, 1.0]]).double()
    b = torch.tensor([[1.0, -0.6], [-0.6, 3.0]]).double()
    x, y = (with_moments(torch.zeros(2).double(), c, 30, i) for i, c in enumerate((a, b)))
    product = a @ b
    trace = torch.sqrt(product.trace() + 2 * product.det().sqrt())
    expected = a.trace() + b.trace() - 2 * trace
    assert m.frechet(m.gaussian(x), m.gaussian(y)) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(("n", "k"), [(200, 300), (300, 12), (25, 200)])
def test_frechet_is_that_of_scipy_and_torchmetrics(n: int, k: int):
    from torchmetrics.image.fid import FrechetInceptionDistance

    mix = normal(16, 16, 5)
    x, y = normal(n, 16, 1) @ mix, normal(k, 16, 2) * 1.3 + 0.2
    value = m.frechet(m.gaussian(x), m.gaussian(y))
    # where a covariance has no full rank, sqrtm is only good to the root of float64's rounding
    assert value == pytest.approx(by_sqrtm(x, y), rel=1e-9 if min(n, k) > 16 else 1e-5)
    net = torch.nn.Identity()
    net.num_features = 16
    theirs = FrechetInceptionDistance(feature=net).set_dtype(torch.float64)
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    assert value == pytest.approx(theirs.compute().item(), rel=1e-6 if min(n, k) > 16 else 1e-4)


def test_halves_of_one_set_are_near_and_alike():
    """Disjoint halves of N samples of a standard normal: 2 F / N from the means, and from the covariances, which differ
    by Δ, tr(Δ²) / 4 with the expectation 2 F (F + 1) / N / 4, to the first order in 1 / N."""
    f, n = 10, 2000
    found = []
    for seed in range(6):
        x = normal(2 * n, f, seed)
        found.append(m.frechet(m.gaussian(x[:n]), m.gaussian(x[n:])))
    expected = 2 * f / n + 2 * f * (f + 1) / n / 4
    assert sum(found) / 6 == pytest.approx(expected, rel=0.15)  # six draws of about 65 / 2 chi-squared terms each
    assert max(found) < 10 * expected < 0.1 * f


def test_fid_interval_holds_the_standard_error():
    """Along one axis the distance of means alone, d², varies by 2 d s / √N: the bootstrap must find that."""
    f, n, d = 3, 400, 4.0
    errors, values = [], []
    y = normal(20_000, f, 99)
    for seed in range(20):
        x = normal(n, f, seed)
        x[:, 0] += d
        figure = m.fid(x, y, rows(x), seed=seed)
        assert figure.low < figure.value < figure.high
        errors.append((figure.high - figure.low) / 2 / 1.96)
        values.append(figure.value)
    assert sum(errors) / 20 == pytest.approx(2 * d / math.sqrt(n), rel=0.1)
    assert torch.tensor(values).std().item() == pytest.approx(2 * d / math.sqrt(n), rel=0.4)  # of 20


def test_frechet_of_some_shows_the_bias():
    x, y = normal(400, 8, 1), normal(400, 8, 2)
    few, more, all_of_them = (m.frechet_of_some(x, y, n) for n in (20, 100, 400))
    assert few > 2 * more > 2 * all_of_them
    assert all_of_them == pytest.approx(m.frechet(m.gaussian(x), m.gaussian(y)), rel=1e-9)


# ---------------------------------------------------------------- kernel distance


def mmd_by_loops(x: Tensor, y: Tensor) -> float:
    """Gretton et al. 2012, eq. 3, term by term."""

    def k(a: Tensor, b: Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, count = len(x), len(y)
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    of_real = sum(k(y[i], y[j]) for i in range(count) for j in range(count) if i != j) / (count * (count - 1))
    return within + of_real - 2 * sum(k(a, b) for a in x for b in y) / (n * count)


def test_kid_is_the_double_loop(monkeypatch):
    x, y = normal(13, 5, 1) + 0.5, normal(17, 5, 2)
    expected = mmd_by_loops(x, y)
    assert m.kid(x, y, rows(x)).value == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(m, "BLOCK", 4)
    assert m.kid(x, y, rows(x)).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = normal(60, 8, 1) * 1.2, normal(60, 8, 2)
    net = torch.nn.Identity()
    net.num_features = 8
    theirs = KernelInceptionDistance(feature=net, subsets=1, subset_size=60)
    theirs.update(y.float(), real=True)
    theirs.update(x.float(), real=False)
    assert m.kid(x, y, rows(x)).value == pytest.approx(theirs.compute()[0].item(), rel=1e-3)  # theirs in float32


def test_kid_has_no_bias_and_its_interval_covers_0():
    """Of one distribution the mean over 40 pairs of sets is 0, and most intervals hold it (95% in the limit)."""
    found = [m.kid(normal(40, 4, 2 * s), normal(400, 4, 2 * s + 1), torch.arange(40), seed=s) for s in range(40)]
    values = torch.tensor([f.value for f in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(40)
    assert sum(f.low <= 0 <= f.high for f in found) >= 32
    repeated = normal(400, 4, 3)[torch.arange(40) // 8]  # few different rows: its own pairs count, as eq. 3 says
    assert m.kid(repeated, normal(400, 4, 3), torch.arange(40)).value > 0.3


@pytest.mark.parametrize("n", [2, 3, 5])
def test_kid_of_few_has_an_interval(n: int):
    """Of few rows some resamples are one row again and again, and have no pair of two."""
    x = normal(n, 4, 1)
    assert any((times > 0).sum() == 1 for times in m.multiplicities(rows(x), 200))
    found = m.kid(x, normal(30, 4, 2), rows(x))
    assert math.isfinite(found.low) and found.low <= found.high < math.inf


# ---------------------------------------------------------------- what is covered


def balls_by_loops(x: Tensor, y: Tensor, k: int) -> tuple[float, float, float, float]:
    def far(a: Tensor, b: Tensor) -> float:
        return math.dist(a.tolist(), b.tolist())

    def radii(z: Tensor) -> list[float]:
        return [sorted(far(a, b) for j, b in enumerate(z) if j != i)[k - 1] for i, a in enumerate(z)]

    of_x, of_y = radii(x), radii(y)
    inside = [[far(a, b) <= r for b, r in zip(y, of_y, strict=True)] for a in x]
    recalled = [any(far(a, b) <= r for a, r in zip(x, of_x, strict=True)) for b in y]
    return (
        sum(any(row) for row in inside) / len(x),
        sum(recalled) / len(y),
        sum(map(sum, inside)) / len(x) / k,
        sum(any(column) for column in zip(*inside, strict=True)) / len(y),
    )


def test_manifolds_are_the_loops(monkeypatch):
    x, y = normal(40, 2, 1) * 0.6 + 0.4, normal(50, 2, 2)
    expected = balls_by_loops(x, y, 3)
    assert all(0.3 < v < 0.99 for v in expected[:2])  # neither all nor none
    for block in (m.BLOCK, 7):
        monkeypatch.setattr(m, "BLOCK", block)
        found = m.manifolds(x, y, rows(x))
        assert [f.value for f in found] == pytest.approx(expected, rel=1e-12)
        assert all(f.low <= f.value <= f.high for f in found)


def test_one_mode_of_two_is_precise_and_forgets_half():
    y = normal(200, 3, 1)
    y[100:, 0] += 50
    x = normal(100, 3, 2)
    found = m.manifolds(x, y, rows(x))
    assert found.precision.value > 0.9 and found.recall.value < 0.5
    far = m.manifolds(x + 1000, y, rows(x))
    assert far.precision.value == far.recall.value == far.density.value == far.coverage.value == 0
    same = m.manifolds(y, y, rows(y))
    assert same.precision.value == same.recall.value == same.coverage.value == 1


# ---------------------------------------------------------------- memorisation


def test_nearest_is_the_centred_cosine():
    y = torch.tensor([[11.0, 10], [10, 11], [9, 10], [10, 9]])
    x = torch.tensor([[12.0, 10], [10.5, 9.5], [10.1, 10.4]])
    far, which = m.nearest(x, y)
    assert which.tolist()[0] == 0 and which[2] == 1
    assert far.tolist() == pytest.approx([0, 1 - math.sqrt(0.5), 1 - 0.4 / math.hypot(0.1, 0.4)], abs=1e-6)


def test_no_copy_is_nearer_than_0():
    y = normal(300, 64) * 3 + 10
    far, which = m.nearest(y[:40], y)
    assert which.equal(torch.arange(40)) and far.min() >= 0 and far.max() < 1e-12


def test_nearer_is_mann_whitney():
    drawn, held = normal(70, 1, 1)[:, 0].round(decimals=1), normal(50, 1, 2)[:, 0].round(decimals=1) + 0.3
    u = scipy.stats.mannwhitneyu(held.numpy(), drawn.numpy()).statistic  # counts held > drawn, ties half
    found = m.nearer(drawn, held, rows(drawn))
    assert found.value == pytest.approx(u / (70 * 50), abs=1e-12)
    assert found.low < found.value < found.high
    assert m.nearer(torch.zeros(5), torch.ones(4), torch.arange(5)).value == 1  # copies
    assert m.nearer(torch.ones(5), torch.ones(4), torch.arange(5)).value == 0.5


# ---------------------------------------------------------------- the bootstrap


def test_mean_interval_is_that_of_the_normal():
    values = normal(900, 1, 4)[:, 0] * 2 + 7
    found = m.mean_figure(values)
    assert found.value == pytest.approx(values.mean().item())
    half = 1.96 * values.std().item() / 30
    # 1,000 resamples: their 2.5% point is uncertain by about 8% of the half-width
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.15 * half)


def test_pictures_of_one_prompt_count_once():
    values, groups = normal(100, 1, 4)[:, 0], torch.arange(100)
    single = m.mean_figure(values, groups)
    four = m.mean_figure(values.repeat_interleave(4), groups.repeat_interleave(4))
    assert (four.low, four.high) == pytest.approx((single.low, single.high), rel=1e-5)
    times = m.multiplicities(groups.repeat_interleave(4), 50)
    assert (times.sum(1) == 400).all() and (times.view(50, 100, 4) == times.view(50, 100, 4)[..., :1]).all()


def test_throughput_is_pictures_over_time():
    found = m.throughput(torch.tensor([10, 10, 5]), torch.tensor([1.0, 3.0, 1.0]))
    assert found.value == 5 and 3.3 < found.low <= 5 <= found.high <= 10
