"""Settings that every test runs under. They are made before torch or transformers is imported, and import neither."""

import os
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in several processes, each on a core of its own
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks a hub for something fails at once
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in a test whether it runs alone, in order or in a worker."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    """What accelerate keeps for a whole process (how it was launched) is the test's own, and gone after it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many ran in each file, and by name what was skipped: no comparison is left out in silence."""
    ran: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        ran.update(Path(r.nodeid.split("::")[0]).stem for r in terminalreporter.stats.get(outcome, []))
    counts = ", ".join(f"{name.removeprefix('test_')} {n}" for name, n in sorted(ran.items()))
    for line in textwrap.wrap(f"ran: {counts or 'nothing'}", 120):
        terminalreporter.write_line(line)
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"skipped: {report.nodeid}")
