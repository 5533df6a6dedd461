"""Settings that every test runs under. They are made before torch or transformers is imported, and import neither."""

import os
import random
import sys

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
