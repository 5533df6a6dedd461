"""Weights that are made when they are sharded: the same numbers, one unit at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ldm.models.dit import DiT
from ldm.models.mmdit import MMDiT
from ldm.models.unet import UNet
from tests import adapting
from tests.live_bytes import LiveBytes
from training import processes, sharded
from training.adapt import opened
from training.base import base_of
from training.deferred import deferred, materialize

UNET = dict(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
)  # fmt: skip
MMDIT = dict(
    sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=3, caption_projection_dim=24,
    joint_attention_dim=24, pooled_projection_dim=14, pos_embed_max_size=12, qk_norm="rms_norm",
)  # fmt: skip
DIT = dict(num_attention_heads=3, attention_head_dim=8, cross_attention_dim=24, sample_size=8, caption_channels=16)


class Odd(nn.Module):
    """Inits of several steps, a tied weight, values that are made before they are parameters, a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4, bias=False)
        self.b.weight = self.a.weight
        self.table = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("waves", torch.linspace(0, 1, 5))
        nn.init.kaiming_normal_(self.a.weight)
        with torch.no_grad():
            self.a.weight[1:3].mul_(2).add_(torch.ones(2, 5))
            self.a.bias.copy_(torch.rand(4))
        self.a.bias.requires_grad_(False)


NETS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet(**UNET),
    "mmdit": lambda: MMDiT(**MMDIT),
    "dit": lambda: DiT(**DIT, num_layers=3),
    "odd": Odd,
}


@pytest.mark.parametrize("name", NETS)
def test_deferred_weights_are_those_of_a_plain_start(name: str):
    """Bit for bit, and the stream of random numbers stands at the same place before and after they are made."""
    torch.manual_seed(3)
    plain, after = NETS[name](), torch.get_rng_state()
    torch.manual_seed(3)
    net = deferred(NETS[name])
    assert torch.get_rng_state().equal(after) and any(p.is_meta for p in net.parameters())
    torch.manual_seed(99)
    before = torch.get_rng_state()
    materialize(net)
    assert torch.get_rng_state().equal(before)
    assert [(n, p.requires_grad) for n, p in net.named_parameters()] == [
        (n, p.requires_grad) for n, p in plain.named_parameters()
    ]
    for (key, x), (_, y) in zip(net.state_dict().items(), plain.state_dict().items(), strict=True):
        assert x.equal(y), key


def one_of_another(net: nn.Linear) -> None:
    with torch.no_grad():
        net.weight.add_(net.bias)


@pytest.mark.parametrize("init", [one_of_another, lambda net: nn.init.trunc_normal_(net.weight)])
def test_what_cannot_be_recorded_says_so(init: Callable[[nn.Linear], object]):
    def build() -> nn.Module:
        init(net := nn.Linear(2, 2))
        return net

    with pytest.raises((NotImplementedError, RuntimeError), match=r"cannot be (recorded|called on meta)"):
        deferred(build)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def first_of_eight():
    """A process that takes itself for one of eight; its collectives do nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield torch.distributed.init_device_mesh("cpu", (8,))
    torch.distributed.destroy_process_group()


def test_one_unit_at_a_time_is_whole(first_of_eight):
    """Beside the shards no more than a block, and what is drawn for it."""
    block = 4 * sum(p.numel() for p in DiT(**DIT, num_layers=1).transformer_blocks.parameters())
    with LiveBytes() as memory:
        net = deferred(lambda: DiT(**DIT, num_layers=12))
    assert memory.peak < block + 128 * 1024  # a tensor, the states of the random numbers, the table of positions
    whole = 4 * sum(p.numel() for p in net.parameters())
    with LiveBytes() as memory:
        processes.share_out(net, mesh=first_of_eight)
    assert sharded.is_split(dict(net.named_parameters()))
    assert memory.peak < whole / 8 + 3 * block < whole / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_is_brought_to_float32_where_it_is_sharded(dtype: torch.dtype, mesh, tmp_path: Path):
    """Until then it is as its file holds it; the weights are those of a process that trains it alone."""
    config = adapting.config("pixart alpha", tmp_path, "run")
    folder = Path(config.base)
    if dtype != torch.float32:
        DiT.from_diffusers(folder / "transformer").to_diffusers().to(dtype).save_pretrained(folder / "transformer")
    base, cpu = base_of(config), torch.device("cpu")
    plain, net = opened(config, base, cpu, "no"), opened(config, base, cpu, "no", on_host=True)
    assert base.stored_dtype() == dtype and {p.dtype for p in net.parameters()} == {dtype}
    processes.share_out(net, mesh=mesh)
    for (name, p), (_, q) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        assert p.requires_grad and p.dtype == torch.float32 and p.full_tensor().equal(q), name
