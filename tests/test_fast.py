"""What a sampling run takes over: exactly, only as long as it lasts, and with a step cache from steps before."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.cond import Cond
from ldm.models.base import Network
from ldm.models.linear import Conv3x3
from ldm.paths import RectifiedFlow
from ldm.prediction import Flow
from ldm.reuse import Run, StepCache, current, once, reuse
from ldm.sampling import SAMPLERS
from pipelines import core
from pipelines.core import Parts, sample_latents
from pipelines.fast import apart, deepest, distance, step_cache_of
from pipelines.lora.live import add_lora, set_weights
from pipelines.lora.targets import LoraSettings
from pipelines.schedulers import default_schedule
from pipelines.text_to_image import TextToImagePipeline
from tests import tiny

NETS = {"unet": tiny.unet, "dit": tiny.dit, "mmdit": tiny.mmdit}
TEXT = {"unet": "to_k", "dit": "to_k", "mmdit": "context_embedder"}  # projects the text, and depends on nothing else
OPTIONS = {"euler_maruyama": {"g": 0.5}, "annealed_langevin": {"steps": 3}}
SCHEDULE = default_schedule(RectifiedFlow(), Flow(), "sd")


def parts(name: str, net: Network | None = None) -> Parts:
    """The text encoder is not asked here, but for its family."""
    return Parts(net or NETS[name](), tiny.vae(), tiny.text(), replace(SCHEDULE, sampler="euler"))


def waves(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cond(name: str, seed: int = 0, rows: int = 2) -> Cond:
    width = {"unet": tiny.WIDTH, "dit": tiny.WIDTH, "mmdit": tiny.JOINT}[name]
    pooled = waves(rows, tiny.POOLED + 2, seed=seed + 2) if name == "mmdit" else None
    return Cond(waves(rows, 5, width, seed=seed + 1), torch.zeros(rows, 5), pooled)


def drawn(of: Parts, told: Cond, away: Cond, **kw: Any) -> Tensor:
    call = {"steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(1)} | kw
    return sample_latents(of, told, away, waves(2, 4, 8, 8, seed=9), **call)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws with nothing taken over."""

    def draw(*args: Any, **kw: Any) -> Tensor:
        with monkeypatch.context() as without:
            without.setattr(core, "reuse", lambda *told, cache: nullcontext(Run(told, cache)))
            return drawn(*args, **kw)

    return draw


def count(module: nn.Module, ending: str) -> list[str]:
    """Names of the calls of these layers, from now on."""
    calls: list[str] = []
    for name, layer in module.named_modules():
        if name.endswith(ending):
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("one_batch", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_the_text_is_projected_once_and_nothing_changes(name: str, one_batch: bool, plain: Any):
    """Bit for bit in the transformers. In the UNet convolutions sum in another order: 1e-6, over four steps."""
    of, two = parts(name), [cond(name), cond(name, 20)]
    expected = [plain(of, c, cond(name, 40), one_batch=one_batch) for c in two]
    calls = count(of.net, f"attn2.{TEXT[name]}" if name != "mmdit" else TEXT[name])
    found = [drawn(of, c, cond(name, 40), one_batch=one_batch) for c in two]  # two prompts in a row
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) if name != "unet" else (x - y).abs().max() < 1e-5 * y.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert len(calls) == len(set(calls)) * 2 * (1 if one_batch else 2)  # of two runs, and not of four steps each
    assert current() is None


def test_convolutions_agree_where_their_weights_are_put_in_order():
    """Odd sides, a stride, no bias, more rows than one: against torch's own convolution."""
    ordered = []
    for b, c, side, stride, bias in ((2, 8, 7, 1, True), (1, 16, 6, 2, True), (3, 5, 4, 1, False), (2, 8, 9, 2, False)):
        layer, x = Conv3x3(c, 2 * c, stride=stride, bias=bias), waves(b, c, side, side)
        expected = nn.functional.conv2d(x, layer.weight, layer.bias, stride, 1)
        with torch.no_grad(), reuse() as run:
            for _ in range(2):
                assert torch.allclose(layer(x), expected, rtol=0, atol=1e-6)
            ordered.append(len(run.answers))
            assert torch.allclose(layer(x.expand(2 * b, -1, -1, -1) if b == 1 else x[:1]), expected[:1], atol=1e-6)
    assert ordered == [1] * 4


def test_lora_acts_and_may_change_between_runs_and_within_one(plain: Any):
    of, told, away = parts("dit"), cond("dit"), cond("dit", 40)
    bare = drawn(of, told, away)
    add_lora(of.net, LoraSettings(rank=2, targets=("to_k", "to_v")), "style")
    for key, p in of.net.named_parameters():
        if "lora" in key:
            p.data = waves(*p.shape, seed=len(key)) * 0.5
    first = drawn(of, told, away)
    assert torch.equal(first, plain(of, told, away)) and (first - bare).abs().max() > 1e-3

    def weigh(i: int, t: Tensor, x: Tensor, d: Any) -> None:
        set_weights(of.net, {"style": 1.0 - 0.3 * (i + 1)})

    within = drawn(of, told, away, on_step=weigh)
    set_weights(of.net, {"style": 1.0})
    assert torch.equal(within, plain(of, told, away, on_step=weigh)) and (within - first).abs().max() > 1e-3
    set_weights(of.net, {"style": 0.5})
    assert torch.equal(drawn(of, told, away), plain(of, told, away))
    with torch.no_grad():
        of.net.get_submodule("transformer_blocks.0.attn2.to_v").base_layer.weight.mul_(2)  # type: ignore[union-attr,operator]
    assert torch.equal(changed := drawn(of, told, away), plain(of, told, away)) and not torch.equal(changed, within)


def test_under_autocast_and_compiled(plain: Any):
    of, told, away = parts("dit"), cond("dit"), cond("dit", 40)
    with torch.autocast("cpu", torch.bfloat16):
        half = drawn(of, told, away)
        assert torch.equal(half, plain(of, told, away))
    assert 0 < (half - drawn(of, told, away)).abs().max() < 0.1 * half.abs().max()
    unet, told, away = parts("unet"), cond("unet"), cond("unet", 40)
    exact = plain(unet, told, away)
    unet.net.compile(backend="eager", fullgraph=True, dynamic=False)
    assert torch.allclose(drawn(unet, told, away), exact, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="compile"):
        drawn(unet, told, away, step_cache=2)


@pytest.mark.parametrize("name", NETS)
def test_where_gradients_are_recorded_nothing_is_kept(name: str):
    """Training, with gradient checkpointing too: inside a run as outside."""
    net, told, x, t = NETS[name](), cond(name), waves(2, 4, 8, 8), torch.tensor([300.0, 700.0])
    net.enable_gradient_checkpointing()

    def slopes() -> list[Tensor]:
        net.zero_grad()
        for _ in range(2):
            net(x, t, told).square().sum().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    expected = slopes()
    with reuse(told, cache=StepCache(2, 0)) as run:
        found = slopes()
        assert not run.answers and not run.inner
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_kept_is_what_lasts_and_as_long_as_the_run():
    made: list[Any] = []

    def make(x: Tensor) -> Tensor:
        made.append(weakref.ref(y := x + 1))
        return y

    told = cond("dit")
    with torch.no_grad():
        with reuse(told):
            assert once(make, once(make, told.tokens)) is once(make, once(make, told.tokens)) and len(made) == 2
            assert once(make, told.tokens.clone()) is not once(make, told.tokens.clone()) and len(made) == 4
            seen: list[Any] = []
            thread = threading.Thread(target=lambda: seen.append(current()))
            thread.start()
            thread.join()
            assert seen == [None]
            with reuse(cond("dit")):  # a run within a run
                assert once(make, told.tokens) is not None and len(made) == 5
            once(make, told.tokens)
            assert len(made) == 5
        gc.collect()
        assert all(ref() is None for ref in made)
        for _ in range(2):
            once(make, told.tokens)
    assert len(made) == 7


# --- the step cache ---------------------------------------------------------------------------------------------------

INNER = {"unet": "mid_block.resnets.0", "dit": "transformer_blocks.2.ff", "mmdit": "transformer_blocks.2.ff"}


@pytest.mark.parametrize("name", NETS)
def test_a_step_cache_in_each_network(name: str, plain: Any):
    """Every second of four steps; in turns as in one batch; near the exact picture, and nearer when deeper."""
    of, told, away = parts(name), cond(name), cond(name, 40)
    exact = plain(of, told, away)
    calls = count(of.net, INNER[name])
    errors = []
    for depth in (0, 1):
        cache = {"every": 2, "depth": depth}
        fast, turns = drawn(of, told, away, step_cache=cache), drawn(of, told, away, step_cache=cache, one_batch=False)
        assert len(calls) == 2 + 2 * 2
        assert torch.allclose(fast, turns, rtol=0, atol=1e-5)
        errors.append(float((fast - exact).norm() / exact.norm()))
        calls.clear()
    assert 0.5 > errors[0] > errors[1] > 1e-5
    assert 0 <= 1 <= deepest(of.net)
    at_most = {"every": 2, "depth": deepest(of.net)}
    drawn(of, told, away, step_cache=at_most)
    assert len(calls) == 2


# how often the network is asked within the whole ones of six steps, which are the first, third and fifth
WHOLE = {"heun": 6, "flow_heun": 6, "midpoint": 6, "dpmpp_2s": 6, "dpmpp_2s_sde": 6, "pndm": 4,
         "predictor_corrector": 6, "annealed_langevin": 9}  # fmt: skip


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "rk45"])
def test_with_every_sampler_a_step_is_whole_or_not(sampler: str):
    """Second-order samplers compute all that a step asks, or nothing of it."""
    of, told, away = parts("unet"), cond("unet"), cond("unet", 40)
    calls = count(of.net, INNER["unet"])
    x = drawn(of, told, away, step_cache=2, steps=6, sampler=sampler, sampler_options=OPTIONS.get(sampler, {}))
    assert x.isfinite().all()
    assert len(calls) == WHOLE.get(sampler, 3)


def test_a_sampler_that_tells_of_no_steps_stays_exact(plain: Any):
    of, told, away = parts("unet"), cond("unet"), cond("unet", 40)
    kw: dict[str, Any] = {"sampler": "rk45", "sampler_options": {"rtol": 1e-2, "atol": 1e-2}}
    assert torch.equal(drawn(of, told, away, step_cache=2, **kw), drawn(of, told, away, **kw))


def test_where_a_weight_changes_a_step_cache_begins_anew():
    """The last layers' LoRA goes after the first of two steps, of which the second would take the first one's."""
    of, told, away = parts("dit"), cond("dit"), cond("dit", 40)
    add_lora(of.net, LoraSettings(rank=2, targets=("to_q",)), "style")
    for key, p in of.net.named_parameters():
        if "lora" in key:
            p.data = waves(*p.shape, seed=len(key))

    def leave_out(i: int, t: Tensor, x: Tensor, d: Any) -> None:
        set_weights(of.net, {"style": 0.0})

    found = []
    for cache in (None, {"every": 2, "depth": 0}):
        set_weights(of.net, {"style": 1.0})
        found.append(drawn(of, told, away, steps=2, guidance_scale=1.0, step_cache=cache, on_step=leave_out))
    assert torch.equal(*found)


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_with_a_picture_the_network_is_spared_as_much(scale: float):
    """Guidance away from the picture too (``kinds.image_guided``): the text is projected once, steps are left out."""
    net = tiny.unet(in_channels=8)
    of, calls = parts("unet", net), count(net, f"attn2.{TEXT['unet']}")
    two = [replace(cond("unet", seed), extra=waves(2, 4, 8, 8, seed=3)) for seed in (0, 40)]
    exact = drawn(of, *two, image_guidance_scale=scale)
    assert len(calls) == len(set(calls))
    fast = drawn(of, *two, image_guidance_scale=scale, step_cache={"every": 4, "depth": 0})
    assert (fast - exact).abs().max() > 1e-3


def test_distance_is_of_the_same_noise():
    pipe = TextToImagePipeline.from_parts(parts("unet"))
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 6, "guidance_scale": 3.0}
    found = distance(pipe, {"every": 3, "depth": 0}, seed=4, **call)

    def draw(output: str, **kw: Any) -> Tensor:
        images: Any = pipe(**call, **kw, generator=torch.Generator().manual_seed(4), output_type=output).images
        return images

    exact, fast = draw("latent"), draw("latent", step_cache=StepCache(3, 0))
    assert found.relative == pytest.approx(float((fast - exact).norm() / exact.norm())) and found.relative > 1e-4
    square = (draw("pt", step_cache=StepCache(3, 0)) - draw("pt")).square().mean()
    assert found.psnr == pytest.approx(-10 * math.log10(square), rel=1e-4)
    assert "dB" in str(found) and apart(exact, exact, exact, exact) == (0, math.inf)


def test_what_a_step_cache_is_told():
    net = tiny.dit()
    assert step_cache_of(net, None) is None and step_cache_of(net, 3) == StepCache(3)
    assert step_cache_of(net, {"depth": 0}) == StepCache(2, 0)
    for wrong, told in (
        (1, "every is 1, expected a whole number from 2"),
        ({"evry": 2}, "no option 'evry'; it takes every"),
        ({"depth": 2}, "depth is 2; this DiT takes 1 at most"),
        ({"depth": -1}, "depth is -1"),
        ({"every": 2.5}, "every is 2.5"),
        (2.5, "step_cache is 2.5, expected every how many steps"),
        ("3", "step_cache is '3', expected every how many steps"),
    ):
        with pytest.raises(ValueError, match=told):
            step_cache_of(net, wrong)  # type: ignore[arg-type]


# --- the host does not wait -------------------------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, in whose place stands the meta device: a copy to or from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            assert {args[0].device.type, y.device.type} != {"cpu", "meta"}, f"{func} of {tuple(args[0].shape)}"
        return y


def on_meta(sampler: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, float]) -> Tensor:
    sample = SAMPLERS[sampler]

    @wraps(sample)
    def watched(*args: Any, **kw: Any) -> Tensor:
        with Watched():
            return sample(*args, **kw)

    monkeypatch.setitem(SAMPLERS, sampler, watched)
    of, noise = parts("unet"), torch.empty(2, 4, 8, 8, device="meta")
    told, away = (replace(cond("unet", seed), bias=None).to("meta") for seed in (0, 40))
    rest = {"sampler": sampler, "sampler_options": options, "step_cache": 2}
    return sample_latents(replace(of, net=of.net.to("meta")), told, away, noise, steps=3, guidance_scale=3.0, **rest)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "rk45"])
def test_the_loop_does_not_wait_for_the_device(sampler: str, monkeypatch: pytest.MonkeyPatch):
    """On the meta device no value can be read: item(), tolist() and bool() raise."""
    x = on_meta(sampler, monkeypatch, OPTIONS.get(sampler, {}))
    assert x.device.type == "meta" and x.shape == (2, 4, 8, 8)


def test_waiting_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    """rk45 says that it waits; a copy from the CPU does too."""
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        on_meta("rk45", monkeypatch, {})
    with Watched(), pytest.raises(AssertionError, match="_to_copy"):
        torch.zeros(3).to("meta")
