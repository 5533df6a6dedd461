"""The plan in docs/scaling.md is what its script prints; memory without data is memory with data."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import scaling
from benchmarks.measure import peak_bytes
from ldm.cond import Cond
from training.arithmetic import parameters, training_flops, training_memory
from training.config import load
from training.sizes import Sizes
from training.tasks.diffusion import network

ROOT = Path(__file__).resolve().parent.parent


def test_the_document_has_the_scripts_table():
    assert scaling.table(scaling.Assumed()) in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_flops_of_a_linear_layer_are_three_products():
    def forward(net: nn.Module, rows: int) -> torch.Tensor:
        return net(torch.randn(rows, 5, 32))

    assert training_flops(lambda: nn.Linear(32, 64), forward) == 3 * 2 * 5 * 32 * 64


def test_stable_diffusion_2_has_the_flops_that_others_count():
    assert scaling.plan("unet_sd2_from_scratch", scaling.Assumed())["training step, one image"] == "2.41 TFLOP"


@pytest.mark.parametrize(
    ("name", "checkpointing", "within"),
    [("unet", 0.0, 0.02), ("mmdit", 0.0, 0.02), ("dit", 1.0, 0.1)],  # what is computed again is held a little longer
)
def test_memory_of_a_step_without_data_is_that_of_one_with(name: str, checkpointing: float, within: float):
    """As torch's allocator reports a real step's; kernels' own buffers are in the one and not in the other."""
    config = load(ROOT / f"configs/openmoji/{name}.yaml", [f"train.gradient_checkpointing={checkpointing}"])
    sizes = Sizes(4, 4, 194, 33, 194) if name == "mmdit" else Sizes(4, 4, 192, 32)

    def forward(net: nn.Module, rows: int) -> torch.Tensor:
        pooled = torch.randn(rows, sizes.pooled_width) if sizes.pooled_width else None
        cond = Cond(torch.randn(rows, sizes.text_length, sizes.text_width), pooled=pooled)
        return net(torch.randn(rows, 4, 16, 16), torch.rand(rows), cond)

    def build() -> nn.Module:
        return network(config, sizes)  # type: ignore[arg-type]

    net = build()

    def step() -> None:
        forward(net, 8).square().mean().backward()
        net.zero_grad(set_to_none=True)

    step()
    told = training_memory(build, forward, 8, averaged=True)
    weights = 4 * parameters(net)[0]
    assert told.weights == pytest.approx(weights, rel=0.01) and told.optimizer == 2 * told.average == 2 * weights
    assert told.total == pytest.approx(4 * weights + peak_bytes(step, torch.device("cpu")), rel=within)
