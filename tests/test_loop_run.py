"""A run's folder and its config: what may change while it goes on, and what is refused in one line."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.killed import configs, draw
from training.config import dump, parse
from training.fit import ConfigError
from training.guards import Watchman
from training.loop import Interrupted
from training.run import begun, check_folder, is_done, open_data, train_all


def config(root: Path, task: str, **train: Any):
    raw = configs(root, root, **train)[task]
    return parse(raw, task)


def begin(run: Path, text: str) -> None:
    """A run with a checkpoint."""
    (run / "checkpoints" / "images_000000008").mkdir(parents=True)
    (run / "checkpoints" / "images_000000008" / "manifest.json").write_text("{}")
    (run / "config.yaml").write_text(text)


def test_before_the_first_checkpoint_a_config_binds_nobody(tmp_path: Path):
    """An override is changed after a check or a start that was broken off."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.yaml").write_text(dump(config(tmp_path, "clip")))
    check_folder(config(tmp_path, "clip", batch_size=4))


@pytest.mark.parametrize("scheduler", ["constant_with_warmup", "cosine"])
def test_a_longer_run_extends_one_whose_schedule_has_no_end(scheduler: str, tmp_path: Path):
    def of(images: int):
        raw = configs(tmp_path, tmp_path, images=images)["clip"]
        raw["optimizer"] = {**raw.get("optimizer", {}), "lr_scheduler": scheduler}
        return parse(raw, "clip")

    begin(tmp_path / "clip", dump(of(64)))
    with pytest.raises(ConfigError, match=r"train\.images: 64 there, 32 here"):
        check_folder(of(32))
    if scheduler == "cosine":
        with pytest.raises(ConfigError, match=r"holds a run of 64 images\. Its optimizer\.lr_scheduler cosine is"):
            check_folder(of(128))
        return
    check_folder(of(128))
    (tmp_path / "clip" / "done.json").write_text('{"inputs": {}}')
    assert is_done(of(64), {}) and not is_done(of(128), {})


def test_keys_that_change_no_number_may_change(tmp_path: Path):
    begin(tmp_path / "clip", dump(config(tmp_path, "clip")))
    more = {"num_workers": 2, "keep_last": 5, "processes": 2, "timeout_minutes": 1.0, "async_checkpoint": True}
    check_folder(config(tmp_path, "clip", **more))
    with pytest.raises(ConfigError, match=r"train\.batch_size: 2 there, 4 here"):
        check_folder(config(tmp_path, "clip", batch_size=4))


def test_a_run_has_begun_where_there_is_something_to_go_on_from(tmp_path: Path):
    clip = config(tmp_path, "clip")
    folder = tmp_path / "clip" / "checkpoints" / "images_000000008"
    folder.mkdir(parents=True)
    assert not begun(clip)
    (folder / "manifest.json").write_text("{}")
    assert begun(clip)


def test_halves_of_a_clip_batch_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="CLIP's loss is over whole batches"):
        train_all([config(tmp_path, "clip", on_out_of_memory="halve")])


def test_a_checkpoint_is_of_one_run(tmp_path: Path):
    two = [config(tmp_path, "clip"), config(tmp_path, "vae")]
    with pytest.raises(ConfigError, match="a checkpoint is of one run"):
        train_all(two, tmp_path / "clip" / "checkpoints" / "images_000000008")


def test_a_signal_in_the_last_step_of_a_stage_keeps_the_next_from_beginning(tmp_path: Path, monkeypatch):
    """The stage is made to the end, and the same command goes on with the next."""
    draw(tmp_path / "data")
    look = Watchman.look

    def interrupted(self: Watchman, images: int, asked: bool, *rest: Any) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return look(self, images, True, *rest)

    stages = [config(tmp_path, task, images=4) for task in ("clip", "vae")]  # one step
    with monkeypatch.context() as patched, pytest.raises(Interrupted) as stopped:
        patched.setattr(Watchman, "look", interrupted)
        train_all(stages)
    assert stopped.value.code == 75
    assert (tmp_path / "clip" / "done.json").is_file() and (tmp_path / "clip" / "pipeline").is_dir()
    assert not (tmp_path / "vae").exists()
    train_all(stages)
    assert (tmp_path / "vae" / "done.json").is_file()


def test_only_the_diffusion_task_streams(tmp_path: Path):
    draw(tmp_path / "data")
    raw = configs(tmp_path, tmp_path)
    raw["clip"]["data"] = raw["stream"]["data"]
    with pytest.raises(ConfigError, match=r"data\.streaming is for the diffusion task; clip needs its rows"):
        open_data(parse(raw["clip"], "clip"))


def test_a_missing_file_of_a_pretrained_part_is_one_line(tmp_path: Path):
    """diffusers tells of it in many."""
    from training.run import _in_one_line

    with pytest.raises(ConfigError) as caught, _in_one_line():
        raise OSError("Error no file named diffusion_pytorch_model.safetensors\n found in directory   /vae.")
    assert str(caught.value).endswith("no file named diffusion_pytorch_model.safetensors found in directory /vae.")
    assert "\n" not in str(caught.value)
