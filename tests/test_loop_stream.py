"""What a stream's processes may be when it goes on."""

from pathlib import Path

import pytest

from training.checkpoint import CheckpointError
from training.state import _feed

FOLDER = Path("images_000000048")


def feed(turn: int, *places: int) -> dict:
    return {"workers": len(places), "turn": turn, "states": [{"images": n} for n in places]}


def test_streams_at_one_place_go_on_with_any_number():
    state = {"world": 2, "feeds": [feed(0, 48, 48), feed(0, 48, 48)]}
    for world in (1, 2, 3):
        assert _feed(FOLDER, state, 0, world) == {"workers": None, "turn": 0, "states": [{"images": 48}]}


def test_streams_at_different_places_go_on_with_as_many():
    feeds = [feed(1, 64, 48), feed(1, 64, 48)]
    state = {"world": 2, "feeds": feeds}
    assert [_feed(FOLDER, state, rank, 2) for rank in range(2)] == feeds
    with pytest.raises(CheckpointError, match=r"read by 2 processes with workers at different places, .* 3 run"):
        _feed(FOLDER, state, 0, 3)


def test_readers_of_lanes_go_on_with_any_number():
    """The states of all readers go to each, which merges them; as many readers have their own."""
    feeds = [{"workers": 1, "turn": 0, "states": [{"batches": n, "places": {}}]} for n in (5, 6)]
    state, readers = {"world": 2, "feeds": feeds}, [feed["states"][0] for feed in feeds]
    together = {"workers": None, "turn": 0, "states": [readers]}
    assert _feed(FOLDER, state, 0, 3) == together
    assert _feed(FOLDER, state, 1, 2) == {**feeds[1], "together": together}


def test_rows_by_number_have_no_place():
    assert _feed(FOLDER, {"world": 2, "feeds": [{}, {}]}, 0, 3) is None
