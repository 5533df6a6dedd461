"""What is trained over frozen weights in bf16: it is float32, learns as over a float32 base, and is written as one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.models import attention
from pipelines.lora.live import add_lora
from pipelines.lora.targets import LoraSettings
from tests.adapting import config
from training.optim import Guarded
from training.processes import started
from training.run import build, open_data, train_all
from training.schema import optim as schema

HALF: dict[str, Any] = {"base_dtype": "bf16", "train": {"mixed_precision": "bf16"}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2}},
    "dora": {"lora": {"rank": 2, "use_dora": True}},
    "text encoder": {"lora": {"rank": 2}, "train_text_encoder": True},
    "textual inversion": {
        "train_denoiser": False, "new_tokens": [{"token": "toy_thing"}],
        "data": {"instance_prompt": "a toy_thing"},
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.getLogger("training").setLevel(logging.WARNING)
    return tmp_path_factory.mktemp("half")


def task_of(family: str, root: Path, name: str, **sections: Any) -> Any:
    made = config(family, root, name, cache={"dir": str(root / "cache")}, **HALF, **sections)
    return build(made, *open_data(made), Path(made.output_dir), started(made.train, "bf16"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart alpha"])
def test_what_trains_over_a_bf16_base_is_float32(family: str, kind: str, root: Path) -> None:
    task = task_of(family, root, f"{family[:6]} {kind}", **KINDS[kind])
    (player,) = task.players
    parts = dict(player.module.named_parameters())
    trained = {name: p for name, p in parts.items() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in parts.values()}
    loss, _ = player.loss(task.rows.__getitems__([(0, 0), (1, 1)]), 0)
    loss.backward()
    norm, skipped = player.optimizer.step()
    assert norm.dtype == skipped.dtype == torch.float32 and norm > 0 and not skipped
    moved = [name for name, p in trained.items() if not p.equal(before[name])]
    assert moved and all(p.isfinite().all() for p in trained.values())
    assert {x.dtype for x in player.optimizer.tensors().values()} == {torch.float32}


OPTIMIZERS = {
    "adamw_8bit": schema.AdamW8bit(name="adamw_8bit", learning_rate=1e-4, adam_weight_decay=0.0),
    "prodigy": schema.Prodigy(name="prodigy", prodigy_d_coef=0.1, adam_weight_decay=0.0),
}


def distance_left(optimizer: schema.AnyOptimizer, dtype: torch.dtype, steps: int = 240) -> float:
    """Share of the distance to a weight that a LoRA over a base of ``dtype`` has left after training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32, bias=False)).to(dtype)
    add_lora(net, LoraSettings(rank=8, targets=("0",)))
    guarded, layer = Guarded(net.named_parameters(), optimizer, 10**6), net[0]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(256, 32, generator=g)
    base: torch.Tensor = layer.base_layer.weight.float()  # type: ignore[union-attr, assignment]
    change = 0.02 * torch.randn(32, 4, generator=g) @ torch.randn(4, 32, generator=g)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        (y.float() - x @ (base + change).T).square().mean().backward()
        guarded.step()
    return ((layer.get_delta_weight("default") - change).norm() / change.norm()).item()  # type: ignore[operator]


@pytest.mark.parametrize(("name", "most"), [("adamw_8bit", 0.90), ("prodigy", 0.22)])
def test_optimizers_that_take_half_precision_learn_as_over_float32(name: str, most: float) -> None:
    """With the adapter in bf16, 0.94 and 0.30 are left: updates that are smaller than a weight's last bit vanish."""
    over_bf16 = distance_left(OPTIMIZERS[name], torch.bfloat16)
    assert over_bf16 < most
    assert over_bf16 == pytest.approx(distance_left(OPTIMIZERS[name], torch.float32), abs=0.01)


def test_the_optimizer_refuses_what_is_not_float32() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False).to(torch.bfloat16))
    adamw = schema.AdamW(name="adamw")
    with pytest.raises(ValueError, match=r"1 of 3 parameters .* not float32, first 1\.weight \(torch\.bfloat16\)"):
        Guarded(net.named_parameters(), adamw, 10)
    net[1].requires_grad_(False)
    Guarded(net.named_parameters(), adamw, 10)


def test_the_state_of_an_adapter_that_trained_in_bf16_goes_on_in_float32() -> None:
    net = nn.Linear(3, 2)
    first, second = (Guarded(net.named_parameters(), schema.AdamW(name="adamw"), 10) for _ in range(2))
    net(torch.ones(1, 3)).sum().backward()
    first.step()
    half = {name: x.bfloat16() if "exp_avg" in name else x for name, x in first.tensors().items()}
    second.load(half, first.state())
    assert {x.dtype for x in second.tensors().values()} == {torch.float32}
    net(torch.ones(1, 3)).sum().backward()
    second.step()


def test_flash_trains_draws_and_exports_where_it_takes_no_float32(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: the step is under autocast; the grid and the export's comparison call the network in float32."""
    calls, flash = [], attention.KERNELS["flash"]

    def on_cuda(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert q.dtype in attention.HALF, "flash takes no float32 on CUDA"
        calls.append(q.requires_grad)
        return flash(q, *rest)

    monkeypatch.setitem(attention.KERNELS, "flash", on_cuda)
    train = {"mixed_precision": "bf16", "attention_backend": "flash", "images": 2, "sample_every": 2}
    made = config("sd", root, "flash", train={**train, "validate_every": 2})
    train_all([made])
    run = Path(made.output_dir)
    assert any(calls) and (run / "samples/images_000000002.png").is_file() and (run / "pipeline").is_dir()
