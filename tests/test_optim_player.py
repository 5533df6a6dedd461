"""What a config makes of a player, on the networks that train; and their blocks, compiled."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.models.base import Network
from tests import tiny
from training.fit import ConfigError
from training.posthoc import replace_weights
from training.schema import ClipConfig
from training.schema.optim import EMA, Muon
from training.tasks.common import compile_blocks, player

NETS = {"unet": tiny.unet, "dit": tiny.dit, "mmdit": tiny.mmdit}


def config(**sections: Any) -> ClipConfig:
    data, train = {"path": "nowhere"}, {"images": 100, "batch_size": 4}
    return ClipConfig(task="clip", output_dir="run", data=data, train=train, **sections)


def accelerator(mixed: str = "no") -> Any:
    return SimpleNamespace(num_processes=1, mixed_precision=mixed, is_fsdp2=False, prepare=lambda module: module)


def loss(batch: Any, images: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.zeros(()), {}


class Wrapped(nn.Module):
    """As the diffusion task hands its network over."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net


# --- players ---------------------------------------------------------------------------------------------------------


def test_a_player_has_what_its_config_says():
    net = nn.Linear(3, 2)
    ema = EMA(snapshot_every=40, sigma_rels=(0.07,))
    made = player("net", net, loss, config(ema=ema, ema_decay=0.5), accelerator(), start=20)
    assert made.optimizer.per_step == 4 and made.optimizer.scaled(torch.ones(())) == 1
    assert made.ema.decay == 0.5 and [p.sigma_rel for p in made.ema.profiles] == [0.07]
    assert made.ema.names == ["weight", "bias"]
    assert [n for n in range(24, 104, 4) if made.ema.snapshot_due(n - 4, n)] == [40, 80, 100]
    scaled = player("net", net, loss, config(), accelerator("fp16"))
    assert scaled.optimizer.scaled(torch.ones(())) == 2**16 and not scaled.ema.profiles
    other = player("critic", net, loss, config(ema=ema), accelerator(), ema_decay=0.0)
    assert not other.ema.profiles and not other.ema.average  # its own average: the config's snapshots are not meant


def test_a_pattern_is_tried_before_anything_is_prepared():
    bad = config(optimizer={"groups": [{"pattern": "nothing", "weight_decay": 0}]})
    with pytest.raises(ConfigError, match="'nothing' matches no parameter"):
        player("net", nn.Linear(3, 2), loss, bad, SimpleNamespace(mixed_precision="no", num_processes=1))


# --- the networks' names ---------------------------------------------------------------------------------------------

FIRST_AND_LAST = {
    "unet": {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight", "time_embedding.linear_2.weight"},
    "dit": {
        *(f"{x}scale_shift_table" for x in ("", *(f"transformer_blocks.{i}." for i in range(3)))),
        *(f"adaln_single.emb.timestep_embedder.linear_{i}.weight" for i in (1, 2)),
        *(f"caption_projection.linear_{i}.weight" for i in (1, 2)),
        *("pos_embed.proj.weight", "proj_out.weight"),
    },
    "mmdit": {
        *(f"time_text_embed.{x}_embedder.linear_{i}.weight" for x in ("timestep", "text") for i in (1, 2)),
        *("pos_embed.proj.weight", "context_embedder.weight", "norm_out.linear.weight", "proj_out.weight"),
    },
}


@pytest.mark.parametrize("name", NETS)
def test_muon_leaves_first_and_last_layers_to_adamw(name: str):
    pattern = Muon(name="muon").adamw_pattern
    for net, prefix in ((NETS[name](), ""), (Wrapped(NETS[name]()), "net.")):
        left = {k for k, p in net.named_parameters() if p.ndim > 1 and re.search(pattern, k)}
        assert left == {prefix + k for k in FIRST_AND_LAST[name]}


@pytest.mark.parametrize("name", NETS)
def test_snapshots_names_are_those_of_the_exported_file(name: str, tmp_path: Path):
    net = NETS[name]()
    net.to_diffusers().save_pretrained(tmp_path / "part")
    new = {k: torch.randn(p.shape) for k, p in Wrapped(net).named_parameters()}
    replace_weights(tmp_path, new)
    again = type(net).from_diffusers(tmp_path / "part")
    assert all(p.equal(new[f"net.{k}"]) for k, p in again.named_parameters())


# --- compiled --------------------------------------------------------------------------------------------------------


def large_unet() -> Network:
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return tiny.unet(block_out_channels=(8, 16, 24), layers_per_block=2, down_block_types=down, up_block_types=up)


def answer(net: Network) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    width = tiny.JOINT if net.stock == "SD3Transformer2DModel" else tiny.WIDTH
    pooled = torch.zeros(2, tiny.POOLED + 2) if net.stock == "SD3Transformer2DModel" else None
    cond = Cond(torch.randn(2, tiny.LENGTH, width, generator=generator), None, pooled)
    return net(torch.randn(2, 4, 8, 8, generator=generator), torch.full((2,), 5.0), cond)


@pytest.mark.parametrize("name, graphs", [("dit", 1), ("mmdit", 2), ("large_unet", 14)])
def test_compiled_blocks_share_their_code(name: str, graphs: int):
    """Answer, gradients and names are those of the plain network; all blocks run compiled, by one graph for each form
    of a block (the MMDiT's last one drops the text; this UNet has 12 forms of a residual block and 2 of a transformer),
    also where these are more than the 8 at which torch gives up."""
    torch._dynamo.reset()
    made_of = {**NETS, "large_unet": large_unet}[name]
    plain, net = made_of().train(), made_of().train()
    expected = answer(plain)
    expected.square().mean().backward()
    made, calls = [], []

    def backend(graph: Any, _: Any) -> Any:
        made.append(graph)

        def run(*given: Any) -> Any:
            calls.append(graph)
            return graph.forward(*given)

        return run

    blocks = compile_blocks(net, backend)
    found = answer(net)
    assert (len(made), len(calls)) == (graphs, blocks)
    assert found.equal(expected)
    found.square().mean().backward()
    assert [k for k, _ in net.named_parameters()] == [k for k, _ in plain.named_parameters()]
    assert all(p.grad.equal(q.grad) for p, q in zip(net.parameters(), plain.parameters(), strict=True))
    answer(net)
    assert (len(made), len(calls)) == (graphs, 2 * blocks)


def test_a_network_without_blocks_is_refused():
    class Bare(Network):
        stock = "AutoencoderKL"

    with pytest.raises(ConfigError, match=r"train.compile: Bare has no blocks"):
        compile_blocks(Bare())
