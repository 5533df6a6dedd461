"""In which precision pictures are drawn, by every command and by the trainer's grids."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.models.vae import VAE
from pipelines.core import Parts, decode, encode
from pipelines.folder import load_parts
from pipelines.precision import DTYPES, cast_parts, dtype_name, sampling_dtype
from pipelines.text_to_image import TextToImagePipeline
from tests import adapting, families, tiny
from training.evaluate.measures_data import Prompt
from training.evaluate.measures_draw import Painter


@pytest.mark.parametrize("has_bf16, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_the_default_is_what_the_card_has_units_for(monkeypatch, has_bf16, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(
        (torch.cuda._on, including_emulation)) or has_bf16)  # fmt: skip

    class On:
        def __init__(self, device: torch.device):
            self.device = device

        def __enter__(self) -> None:
            torch.cuda._on = self.device

        def __exit__(self, *_: object) -> None:
            torch.cuda._on = None

    monkeypatch.setattr(torch.cuda, "_on", None, raising=False)
    monkeypatch.setattr(torch.cuda, "device", On)
    assert sampling_dtype("cuda:1") == expected
    assert asked == [(torch.device("cuda:1"), False)]
    assert sampling_dtype("cpu") == torch.float32
    for name, dtype in DTYPES.items():
        assert sampling_dtype("cuda", name) == sampling_dtype("cpu", name) == dtype
        assert dtype_name(dtype) == name
    with pytest.raises(ValueError, match="dtype float16: expected one of fp32, bf16, fp16"):
        sampling_dtype("cuda", "float16")


def tensors(parts: Parts) -> dict[str, torch.Tensor]:
    modules: dict[str, nn.Module] = {"net": parts.net, "vae": parts.vae}
    modules |= {name: model for name, (_, model) in parts.text.towers().items()}
    return {
        f"{name}.{key}": x
        for name, module in modules.items()
        for key, x in [*module.named_parameters(), *module.named_buffers()]
    }


@pytest.mark.parametrize("name", ["sd3", "pixart alpha"])
def test_a_cast_is_what_the_folder_opens_as(name: str, tmp_path: Path):
    """So that a grid is drawn by the weights that ``ldm sample`` draws with: also T5's, some of which stay float32."""
    families.PIPELINES[name]().save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    before = {key: x.clone() for key, x in tensors(parts).items()}
    for dtype in (torch.bfloat16, torch.float16):
        ours, opened = tensors(cast_parts(parts, dtype)), tensors(load_parts(tmp_path, dtype))
        assert ours.keys() == opened.keys()
        for key, x in opened.items():
            assert ours[key].dtype == x.dtype and ours[key].equal(x), key
    assert all(x.dtype == before[key].dtype and x.equal(before[key]) for key, x in tensors(parts).items())
    same = cast_parts(parts, torch.float32)
    assert (same.net, same.vae, same.text) == (parts.net, parts.vae, parts.text)


def test_a_copy_shares_the_hooks_of_calls():
    """A bound method's object, such as the task whose grid is timed, is neither copied nor passed by."""

    class Counter:
        calls = 0

        def count(self, *_: object) -> None:
            self.calls += 1

    counter, net = Counter(), nn.Linear(2, 2)
    net.register_forward_pre_hook(counter.count)
    net.register_forward_hook(counter.count)
    parts = Parts(net, nn.Identity(), nn.Identity(), None)  # type: ignore[arg-type]
    copied = cast_parts(parts, torch.bfloat16).net
    copied(torch.zeros(1, 2, dtype=torch.bfloat16))
    assert copied is not net and counter.calls == 2


def overflowing(weight: float = 300.0) -> VAE:
    """Finite in float32; within it numbers reach beyond 65,504, and a norm brings them back."""
    vae = tiny.vae()
    for conv in (vae.decoder.conv_in, vae.encoder.conv_in):
        conv.weight.data *= weight**2
        conv.bias.data *= weight**2
    return vae.eval()


def test_an_autoencoder_that_overflows_works_in_float32(caplog):
    vae, z = overflowing(), torch.randn(2, 4, 4, 4) * 3
    exact, half = decode(vae, z), overflowing().half()
    assert exact.isfinite().all()
    with caplog.at_level(logging.WARNING):
        drawn = [decode(half, z), decode(half, z)]
        moments = encode(half, exact * 2 - 1)
    assert [r.message for r in caplog.records] == [
        "the autoencoder overflows in float16 and works in float32 from now on; bfloat16 (--dtype bf16) has room"
    ]
    assert half.dtype == torch.float16 and moments.mean.isfinite().all()
    for x in drawn:
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, exact, atol=5e-3, rtol=0)  # float16's weights


def test_what_was_no_number_before_is_not_the_autoencoders_fault(caplog):
    vae = tiny.vae().half()
    z = torch.full((1, 4, 4, 4), torch.nan)
    with caplog.at_level(logging.WARNING):
        assert decode(vae, z).isnan().any()
    assert not caplog.records
    assert decode(vae, torch.zeros(1, 4, 4, 4)).dtype == torch.float16


@pytest.mark.parametrize(
    "dtype, case", [pytest.param("fp16", {"ema_decay": 0.5}, marks=pytest.mark.slow), ("bf16", {"lora": {"rank": 2}})]
)
def test_the_grid_is_the_users_picture_in_any_precision(dtype: str, case: dict, tmp_path: Path, monkeypatch):
    """A card where half precision is the default: what the last step's grid shows is what ``ldm sample`` then draws
    with the exported files, bit for bit; the networks that trained in float32 are what they were."""
    spied = adapting.spied(monkeypatch)
    monkeypatch.setattr("training.tasks.diffusion.sampling_dtype", lambda _: DTYPES[dtype])
    run = adapting.trained("sd", tmp_path, "run", train={"sample_every": 6}, **case)
    source = run / "pipeline" if "lora" not in case else adapting.base("sd", tmp_path)
    pipe = families.quiet(TextToImagePipeline.from_pretrained(source, dtype=DTYPES[dtype]))
    if "lora" in case:
        pipe.load_lora_weights(run)
    drawn = adapting.drawn(pipe, spied["prompts"])
    assert spied["pictures"].dtype == drawn.dtype == DTYPES[dtype]
    assert spied["pictures"].equal(drawn)
    single = families.quiet(TextToImagePipeline.from_pretrained(source))
    if "lora" in case:
        single.load_lora_weights(run)
    assert (adapting.drawn(single, spied["prompts"]) - drawn).abs().max() > 1e-4  # another precision does show


def test_the_judges_painter_draws_in_the_precision_that_is_asked_for(tmp_path: Path):
    """Its drawings lie apart from those in another precision; the loss and the bits are float32's."""
    families.PIPELINES["sd"]().save_pretrained(tmp_path / "pipeline")
    folders = {}
    for dtype in (None, "fp32", "bf16"):
        painter = Painter(tmp_path / "pipeline", torch.device("cpu"), 2, 3.0, None, dtype)
        prompts = [Prompt("a red apple", False)]
        drawn, folder = painter.draw(prompts, 1, 0, 1, tmp_path / "drawn", lambda *_: None)
        folders[dtype] = folder, drawn.files[0].read_bytes()
        assert painter.pipeline.net.dtype == sampling_dtype("cpu", dtype)
        assert painter.in_float32().net.dtype == torch.float32
    assert folders[None] == folders["fp32"]
    assert folders["bf16"][0] != folders["fp32"][0] and folders["bf16"][1] != folders["fp32"][1]
