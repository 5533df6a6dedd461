"""How a run's kernels are chosen: TF32, cuDNN's search, deterministic ones, the order of memory, compiled blocks."""

from __future__ import annotations

import copy
import os
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tests import killed
from training import device
from training.checkpoint import listed
from training.config import parse
from training.fit import ConfigError, check_together
from training.losses import ClipDistance
from training.optim import placed
from training.run import cache_all, open_data, train_all
from training.schema import Train

SLOW = partial(pytest.param, marks=pytest.mark.slow)
# Of aten, what raises on CUDA under torch.use_deterministic_algorithms(True), by its docstring.
NOT_DETERMINISTIC = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
    "avg_pool3d_backward", "max_pool3d_with_indices_backward", "fractional_max_pool2d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward", "replication_pad2d_backward", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward", "nll_loss2d_forward", "_ctc_loss_backward",
    "_embedding_bag_dense_backward", "put_", "histc", "bincount", "grid_sampler_2d_backward", "cumsum", "median",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures, a CLIP, an autoencoder and a UNet to build on."""
    root = tmp_path_factory.mktemp("kernels")
    killed.draw(root / "data")
    train_all([parse(raw(root, root, task), task) for task in ("clip", "vae", "unet")])
    return root


def raw(root: Path, out: Path, task: str, **train: Any) -> dict[str, Any]:
    often = {"checkpoint_every": 6, "log_every": 2, "validate_every": 12}
    short = {"images": 12, "gradient_accumulation_steps": 1, "report_to": "none"}
    told = killed.configs(root, out, **{**often, **short, **train})
    found = copy.deepcopy(told["unet" if task in ("dit", "mmdit") else task])
    if task in ("dit", "mmdit"):
        found["model"] = {"name": task, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
        found["output_dir"] = str(out / task)
    if task == "vae":
        found["loss"]["gan_start"] = 4
    if task in ("unet", "dit", "mmdit", "adapt"):
        found["sample"] = {"prompts": ["red box 2"], "num_inference_steps": 2, "guidance_scale": 2.0}
    if task == "adapt":
        del found["prior"]
    return found


def weights(run: Path) -> dict[str, bytes]:
    files = [x for name in ("pipeline", "adapter") for x in (run / name).rglob("*.safetensors")]
    assert files
    return {str(x.relative_to(run)): x.read_bytes() for x in files}


def losses(run: Path) -> list[dict[str, float]]:
    return killed.losses(run)


# --- the context -----------------------------------------------------------------------------------------------------


def chosen() -> tuple[Any, ...]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    strict = torch.are_deterministic_algorithms_enabled()
    return matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, strict


def test_the_kernels_are_the_configs_and_afterwards_what_they_were(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = chosen()
    with device.kernels(Train(images=1), 1):
        assert chosen() == (True, True, True, False, False)
        assert torch.get_float32_matmul_precision() == "high"  # as inductor asks, and it did not raise
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        with device.kernels(Train(images=1, allow_tf32=False, deterministic=True), 1):
            assert chosen() == (False, False, False, True, True)
        assert chosen() == (True, True, True, False, False)
    with device.kernels(Train(images=1), 3):  # several sizes of pictures: it would search again at each
        assert chosen()[2] is False
    assert chosen() == before


def test_what_a_user_set_by_torchs_newer_flags_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="allow_tf32"):
        chosen()
    try:
        with device.kernels(Train(images=1, allow_tf32=False), 1):
            assert chosen()[:2] == (False, False)
        assert chosen()[:2] == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_cublas_is_told_before_cuda_starts(monkeypatch, root: Path, tmp_path: Path):
    config = parse(raw(root, tmp_path, "unet"), "unet")
    strict = parse(raw(root, tmp_path, "unet", deterministic=True), "unet")
    monkeypatch.delenv(device.CUBLAS, raising=False)
    device.prepare([config])
    assert device.CUBLAS not in os.environ
    monkeypatch.setattr(device, "kernels", lambda *_: pytest.fail("trained"))
    monkeypatch.setenv(device.CUBLAS, ":0:0")
    with pytest.raises(ConfigError, match=r"train\.deterministic: CUBLAS_WORKSPACE_CONFIG=:0:0 is set"):
        train_all([config, strict.model_copy(update={"output_dir": str(tmp_path / "other")})])
    monkeypatch.delenv(device.CUBLAS)
    device.prepare([config, strict])
    assert os.environ[device.CUBLAS] == ":4096:8"
    monkeypatch.delenv(device.CUBLAS)


def test_cache_and_class_pictures_are_made_by_the_runs_kernels(monkeypatch, root: Path, tmp_path: Path):
    deterministic: list[bool] = []

    def spy(*_: Any, **__: Any) -> dict[str, int]:
        deterministic.append(torch.are_deterministic_algorithms_enabled())
        return {}

    monkeypatch.setattr("training.cache.make_cache", spy)
    monkeypatch.setattr("training.prior.class_pictures", spy)
    monkeypatch.setattr("training.prior.with_prior", lambda config, _: config)
    monkeypatch.setenv(device.CUBLAS, ":16:8")
    cache_all([parse(raw(root, tmp_path, "unet", deterministic=True), "unet")])
    prior = {"class_prompt": "red box", "num_class_images": 4, "num_inference_steps": 2}
    open_data(parse({**raw(root, tmp_path, "adapt", deterministic=True), "prior": prior}, "adapt"))
    assert deterministic == [True, True] and not torch.are_deterministic_algorithms_enabled()


# --- deterministic ---------------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """The names of all operators that run, in backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@cache
def strict_run(root: Path, task: str) -> tuple[Path, set[str]]:
    """A deterministic run, and the operators that ran in it."""
    given = raw(root, root / "strict", task, deterministic=True)
    with Ops() as ops:
        train_all([parse(given, task)])
    return Path(given["output_dir"]), ops.names


@pytest.mark.parametrize("task", ["clip", "vae", "unet", "dit", SLOW("mmdit"), "adapt"])
def test_a_deterministic_run_takes_nothing_that_has_no_such_kernel(task: str, root: Path):
    run, ops = strict_run(root, task)
    assert {"mm", "_fused_adamw_"} <= ops
    assert not ops & NOT_DETERMINISTIC
    if (root / task).exists():  # on a CPU the same bits as ever
        assert weights(run) == weights(root / task)


def test_a_loss_that_has_to_resize_is_refused(root: Path, tmp_path: Path):
    """In its backward pass is an operator without a deterministic kernel."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=8)
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=16, **small))
    for side, expected in ((16, set()), (24, {"_upsample_bicubic2d_aa_backward"})):
        with Ops() as ops:
            x, y = torch.rand(2, 1, 3, side, side)
            ClipDistance(tower)(x.requires_grad_(), y).sum().backward()
        assert ops.names & NOT_DETERMINISTIC == expected
    vae = raw(root, tmp_path, "vae", deterministic=True)
    vae["loss"]["perceptual"] = f"clip:{root / 'clip'}"
    clip = parse(raw(root, root, "clip"), "clip")
    check_together([parse(vae, "vae")])
    vae["data"]["resolution"] = 32
    for configs in ([parse(vae, "vae")], [clip, parse(vae, "vae")]):  # a finished CLIP, and one that is yet to be made
        with pytest.raises(ConfigError, match=r"vae: train\.deterministic: clip:.* sees pictures of 16 px, .* of 32"):
            check_together(configs)
    vae["train"]["deterministic"] = False
    check_together([parse(vae, "vae")])


@pytest.mark.parametrize(
    "task, train, message",
    [
        ("unet", {"deterministic": True, "attention_backend": "xformers"}, "xFormers' backward passes"),
        ("dit", {"channels_last": True}, "channels_last is for a UNet or an autoencoder"),
        ("clip", {"channels_last": True}, "channels_last is for a UNet or an autoencoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_the_config(task: str, train: dict, message: str, root: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        parse(raw(root, tmp_path, task, **train), task)


# --- channels last ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [SLOW("vae"), "unet"])
def test_channels_last_learns_the_same_and_leaves_plain_files(task: str, root: Path, tmp_path: Path, monkeypatch):
    """Weights, gradients, averages and the optimizer's state lie in one order, also after going on from a file."""
    from training import gradients

    def looked(player: Any, *given: Any) -> Any:
        found = gradients.gradients(player, *given)
        for p, average in zip(player.optimizer.parameters, player.ema.average, strict=False):
            state = player.optimizer.steppers[0].optimizer.state.get(p, {})
            for x in (p.grad, average, state.get("exp_avg"), state.get("exp_avg_sq")):
                assert x is None or x.stride() == p.stride()
        last.append(sum(not p.is_contiguous() for p in player.optimizer.parameters))
        return found

    last: list[int] = []
    monkeypatch.setattr("training.loop.gradients", looked)
    given = raw(root, tmp_path, task, channels_last=True)
    train_all([parse(given, task)])
    assert max(last) > 8
    for here, there in zip(losses(tmp_path / task), losses(root / task), strict=True):
        assert here == pytest.approx(there, rel=2e-3), here["images"]
    whole = weights(tmp_path / task)
    assert all(x.is_contiguous() for f in (tmp_path / task).rglob("*.safetensors") for x in load_file(f).values())

    run = tmp_path / task  # as if killed after the first checkpoint
    (run / "done.json").unlink()
    shutil.rmtree(run / "pipeline")
    shutil.rmtree(listed(run / "checkpoints")[-1])
    assert listed(run / "checkpoints")[-1].name == "images_000000006"
    train_all([parse(given, task)])
    assert weights(run) == whole


def test_what_is_stored_takes_its_weights_order():
    like = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    stored = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    found = placed(stored, like)
    assert found.stride() == like.stride() and found.dtype == torch.bfloat16 and found.equal(stored)
    assert placed(stored, torch.zeros(2, 3, 4, 5)) is stored


# --- compiled --------------------------------------------------------------------------------------------------------


def compiled_run(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, inner: Any = None) -> list[tuple[int, str]]:
    """Train, with ``inner`` or nothing behind torch.compile's capture; for each graph that was made, at which image and
    in the step of which player. No graph breaks are allowed."""
    from training import gradients

    made, place = [], [(-1, "outside a step")]

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(place[-1])
        return inner(graph, inputs) if inner else graph.forward

    def step(player: Any, pieces: Any, images: int, *more: Any) -> Any:
        place.append((images, player.name))
        found = gradients.gradients(player, pieces, images, *more)
        place.pop()
        return found

    torch._dynamo.reset()
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr("training.tasks.common.BACKEND", backend)
        patch.setattr("training.loop.gradients", step)
        train_all([parse(given, given["task"])])
    torch._dynamo.reset()
    assert not counters["graph_break"]
    return made


@pytest.mark.parametrize(
    "task, checkpointing",
    [("clip", 0), SLOW("vae", 1), ("unet", 0.5), ("dit", 0.5), SLOW("mmdit", 0), SLOW("adapt", 0.5)],
)
def test_a_compiled_run_learns_the_same_and_compiles_in_its_first_step(
    task: str, checkpointing: float, root: Path, tmp_path: Path, monkeypatch
):
    """With averages, gradient checkpointing, LoRA, validation, grids and checkpoints; no file knows of it."""
    how: dict[str, Any] = {"compile": True, "gradient_checkpointing": checkpointing, "validate_every": 4}
    given = raw(root, tmp_path, task, **how, sample_every=4 if task == "unet" else 10**6)
    first = {"clip": "clip", "vae": "vae"}.get(task, "net")
    made = compiled_run(given, monkeypatch)
    assert made and set(made) == {(0, first)}
    run = tmp_path / task
    there = losses(strict_run(root, task)[0])
    there = {row["images"]: row for row in there if "loss" in row}
    for row in losses(run):
        if "loss" in row:
            assert row["loss"] == pytest.approx(there[row["images"]]["loss"], rel=1e-4), row["images"]
    assert not any("_orig_mod" in name for f in run.rglob("*.safetensors") for name in load_file(f))
