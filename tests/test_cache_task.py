"""The diffusion task on cached and on live inputs: the same numbers, and nothing in memory that is not needed."""

from __future__ import annotations

import functools
import json
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from ldm import rng
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from tests import tiny
from tests.stand_in import CAPTIONS, Bucketed
from training.batches import Stream
from training.cache import make_cache
from training.config import parse
from training.schema import DiffusionConfig
from training.schema.cache import Cache
from training.schema.tasks import Validation
from training.tasks import diffusion
from training.tasks.diffusion import DiffusionTask, first_distinct

NETS: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2},
    "mmdit": {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "pos_embed_max_size": 12},
    "dit": {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
}

LEVELS = Validation().levels


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of an autoencoder and a CLIP."""
    root = tmp_path_factory.mktemp("parts")
    tiny.vae().to_diffusers().save_pretrained(root / "vae")
    tiny.clip().save_pretrained(root / "clip")
    tiny.tokenizer().save_pretrained(root / "clip")
    return root


class Squares(Bucketed):
    """All of one shape, so that a batch may hold any of them."""

    def __init__(self, total: int = 12, seed: int = 0, masked: bool = False):
        super().__init__(3 * total, seed, masked)
        self.bytes, self.texts, self.bucket = self.bytes[::3], self.texts[::3], self.bucket[::3]


def config_of(parts: Path, run: Path, net: str = "unet", **data: Any) -> DiffusionConfig:
    raw = {
        "task": "diffusion", "output_dir": str(run), "data": {"path": "unused", "resolution": 16, **data},
        "vae": {"pretrained": str(parts / "vae")}, "text": {"pretrained": str(parts / "clip")},
        "model": {"name": net, **NETS[net]}, "train": {"images": 8, "batch_size": 4, "mixed_precision": "no"},
        "caption_dropout": 0.3, "sample": {"prompts": CAPTIONS[:1], "num_inference_steps": 2}, "seed": 7,
    }  # fmt: skip
    return cast(DiffusionConfig, parse(raw, "test"))


def task_of(config: DiffusionConfig, train: Any = None, held_out: Any = None, **how: Any) -> DiffusionTask:
    torch.manual_seed(3)
    train, held_out = train or Squares(), held_out or Squares(4, seed=1)
    config = config.model_copy(update={"cache": Cache(**how)})
    return DiffusionTask(config, train, held_out, Path(config.output_dir), Accelerator(cpu=True))


PAIRS = [(100 + n, n % 12) for n in range(24)]


@pytest.mark.parametrize("net", NETS)
def test_cached_and_live_inputs_are_the_same_numbers(net: str, parts: Path, tmp_path: Path):
    """Flips, drops, each row's variants, the posterior's sample; then the loss, and the fixed probes."""
    config = config_of(parts, tmp_path / "run", net, random_flip=True)
    found, losses, probes = [], [], []
    for latents, text in ((True, True), (False, False), (True, False), (False, True)):
        task = task_of(config, latents=latents, text=text)
        batch = task.rows.__getitems__(PAIRS)
        assert ("moments" in batch, "tokens" in batch) == (latents, text)
        assert ("pictures" in batch, "captions" in batch) == (not latents, not text)
        found.append(task._inputs(batch, train=True))
        losses.append(task.loss(batch, 0)[0].item())
        probes.append(list(task.held_out().values()))
    (z, cond), *others = found
    drops = rng.uniform(7, torch.arange(100, 124), (), Stream.CAPTION) < 0.3
    assert 0 < drops.sum() < 24
    null = task.encoders.text.null()
    assert torch.allclose(cond.tokens[drops], null.tokens, atol=1e-5)
    for other_z, other in others:
        torch.testing.assert_close(other_z, z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.tokens, cond.tokens, rtol=1e-5, atol=1e-5)
        for name in ("bias", "pooled"):
            a, b = getattr(other, name), getattr(cond, name)
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for other in probes:
        assert other == pytest.approx(probes[0], rel=1e-5)


def test_live_encoders_learn_nothing(parts: Path, tmp_path: Path):
    task = task_of(config_of(parts, tmp_path), latents=False, text=False)
    loss, _ = task.loss(task.rows.__getitems__(PAIRS), 0)
    loss.backward()
    assert all(p.grad is not None for p in task.net.parameters())
    frozen = [*task.encoders.vae.parameters(), *task.encoders.text.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not list(tmp_path.rglob("*.npy"))  # and nothing is cached


@pytest.mark.parametrize(("latents", "text"), [(True, True), (True, False), (False, True)])
def test_encoders_are_in_memory_only_where_they_are_needed(
    latents: bool, text: bool, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept: dict[type, Any] = {VAE: weakref.WeakSet(), TextEncoder: weakref.WeakSet()}
    for kind, instances in kept.items():

        def init(self: Any, *args: Any, plain: Any = kind.__init__, instances: Any = instances, **kw: Any) -> None:
            plain(self, *args, **kw)
            instances.add(self)

        monkeypatch.setattr(kind, "__init__", functools.wraps(kind.__init__)(init))

    def held() -> tuple[int, int]:  # at once, and not when some cycle is collected
        return len(kept[VAE]), len(kept[TextEncoder])

    config = config_of(parts, tmp_path / "run")
    task = task_of(config, latents=latents, text=text)
    needed = (int(not latents), int(not text))
    assert held() == needed
    task.loss(task.rows.__getitems__(PAIRS), 0)
    task.held_out()
    assert held() == needed
    state = torch.get_rng_state()
    for name in ("a.png", "b.png"):
        task.sample(tmp_path / name)
        assert held() == needed
    assert torch.equal(torch.get_rng_state(), state)  # opening them again draws nothing that training would miss
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    parts_again = task.parts
    assert held() == (1, 1)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(parts_again.vae.encode(x).mean, tiny.vae().encode(x).mean)


def test_the_encoders_go_out_with_the_network(parts: Path, tmp_path: Path):
    task = task_of(config_of(parts, tmp_path / "run"))
    task.export()
    assert task.encoders._vae is None and task.encoders._text is None
    weights = load_file(tmp_path / "run/pipeline/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in tiny.vae().to_diffusers().state_dict().items())


def test_a_network_starts_the_same_with_a_full_and_an_empty_cache(parts: Path, tmp_path: Path):
    config = config_of(parts, tmp_path)
    starts = []
    for how in ({}, {}, {"latents": False, "text": False}):
        task = task_of(config, **how)
        starts.append([p.detach().clone() for p in task.net.parameters()])
        starts[-1].append(torch.get_rng_state())
    for other in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], other, strict=True))


def test_half_precision_gives_nearly_the_same_loss(parts: Path, tmp_path: Path):
    """Moments and tokens to 2^-11 and 2^-8 of their size."""
    config = config_of(parts, tmp_path)
    losses = {}
    for precision in ("fp32", "fp16", "bf16"):
        task = task_of(config, precision=precision)
        z, cond = task._inputs(task.rows.__getitems__(PAIRS), train=True)
        assert z.dtype == cond.tokens.dtype == torch.float32
        losses[precision] = task.loss(task.rows.__getitems__(PAIRS), 0)[0].item()
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=2e-3) and losses["fp16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


@pytest.mark.parametrize("latents", [True, False])
def test_masks_weigh_the_loss(latents: bool, parts: Path, tmp_path: Path):
    """By hand: mean(mask * error²) / mean(mask) of each row."""
    rows = Squares(masked=True)
    task = task_of(config_of(parts, tmp_path), rows, Squares(4, seed=1, masked=True), latents=latents)
    batch = task.rows.__getitems__(PAIRS)
    z, cond = task._inputs(batch, train=True)
    mask = rows.masks([row for _, row in PAIRS]).reshape(24, 1, 8, 2, 8, 2).mean((3, 5))
    torch.testing.assert_close(batch["mask"], mask)
    t = task.time(rng.uniform(7, batch["index"], (), Stream.TIME), batch["index"])
    eps = rng.normal(7, batch["index"], z.shape[1:], Stream.NOISE)
    w = t.view(-1, 1, 1, 1)
    square = (task.net((1 - w) * z + w * eps, torch.floor(1000 * t), cond) - (eps - z)).square()
    expected = ((mask * square).mean((1, 2, 3)) / mask.mean((1, 2, 3))).mean()
    assert task.loss(batch, 0)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() != pytest.approx(square.mean().item(), rel=1e-4)


def test_probes_in_buckets_are_each_rows_own(parts: Path, tmp_path: Path):
    """Rows of three shapes, grouped for the network, each at its own times and noise."""
    held_out = Bucketed(9, seed=1)
    task = task_of(config_of(parts, tmp_path, "dit"), Bucketed(9), held_out)
    seen: list[Tensor] = []
    losses = []
    with torch.no_grad():
        for i in range(9 * LEVELS):
            batch = task.test_rows.__getitems__([(diffusion.FIXED + i, i // LEVELS)])
            z, cond = task._inputs(batch, train=False)
            t = torch.tensor([(i % LEVELS + 0.5) / LEVELS])
            eps = rng.normal(7, batch["index"], z.shape[1:], Stream.NOISE)
            losses.append(task.denoiser.loss(z, t, cond, eps=eps))
            seen.append(z)
    assert {x.shape[2:] for x in seen} == {(8, 8), (4, 12), (12, 4)}
    assert task.held_out()["held_out_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_probes_are_shared_out_among_processes(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of three processes calls the network as often, and the sum of their parts is what one alone finds."""
    monkeypatch.setattr(diffusion, "TOKENS", 12 * 8 * 8)  # 8 chunks of 12
    config = config_of(parts, tmp_path)
    task = task_of(config.model_copy(update={"validation": Validation(rows=12)}))
    whole, sums, calls = task._probe(task.train_rows), [], []
    plain = task._inputs

    class One:
        num_processes = 3

        def __init__(self, rank: int):
            self.process_index = rank

        def reduce(self, x: Tensor, how: str) -> Tensor:
            assert how == "sum"
            sums.append(x)
            return x

    for rank in range(3):
        calls.append(0)

        def counted(*args: Any, **how: Any) -> Any:
            calls[-1] += 1
            return plain(*args, **how)

        task.accelerator, task._inputs = One(rank), counted
        task._probe(task.train_rows)
    assert calls == [3, 3, 3]
    torch.testing.assert_close(torch.stack(sums).sum(0).unflatten(0, (-1, LEVELS)).mean(0), whole)
    assert all((x != 0).sum() in (36, 24) for x in sums)


def test_pictures_of_which_none_is_held_out_are_measured_once(parts: Path, tmp_path: Path, monkeypatch):
    """``data.held_out: 0`` makes both splits the same; the numbers are those of two measurements."""
    rows = Squares(5)
    rows.content = lambda: np.arange(5)  # type: ignore[attr-defined]
    config = config_of(parts, tmp_path, held_out=0)
    config = config.model_copy(update={"validation": Validation(rows=3, levels=2)})
    task = task_of(config, rows, rows)
    probed, probe = [], task._probe
    task._probe = lambda x: (probed.append(x), probe(x))[1]  # type: ignore[method-assign]
    once = task.held_out()
    assert len(probed) == 1 and [name for name in once if "_at_" in name] == [
        "held_out_loss_at_0.25", "held_out_loss_at_0.75",
    ]  # fmt: skip
    task.same_rows = False
    assert task.held_out() == once and len(probed) == 3
    assert not task_of(config.model_copy(update={"data": config.data.model_copy(update={"held_out": 0.1})})).same_rows


def test_size_conditions_are_the_rows_or_the_pictures(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SDXL's UNet is told what the rows know, and where they know nothing, that nothing was cut."""
    pooled, width = 5, 8
    net = tiny.unet(
        addition_embed_type="text_time", addition_time_embed_dim=width,
        projection_class_embeddings_input_dim=6 * width + pooled,
    )  # fmt: skip
    monkeypatch.setattr(diffusion, "network", lambda *_: net)
    rows = Squares()
    task = task_of(config_of(parts, tmp_path), rows)
    batch = task.rows.__getitems__(PAIRS[:3])
    assert task._inputs(batch, train=False)[1].size_ids.equal(rows.size_ids([row for _, row in PAIRS[:3]]))
    batch.pop("size_ids")
    assert task._inputs(batch, train=False)[1].size_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 3


class Flow(torch.utils.data.IterableDataset):
    """Batches of pictures and captions, as a streamed data set gives them."""

    def __init__(self, rows: Bucketed):
        self.rows = rows

    def __iter__(self) -> Any:
        batch = {"index": torch.arange(4), "row": torch.arange(4), "captions": [x[0] for x in self.rows.texts[:4]]}
        yield batch | {"pictures": self.rows.pictures(range(4)).float() / 127.5 - 1}


def test_a_stream_is_encoded_as_it_comes(parts: Path, tmp_path: Path):
    config = config_of(parts, tmp_path)
    rows = Squares()
    for i, text in enumerate(rows.texts):
        rows.texts[i] = text[:1]
    cached = task_of(config, rows)
    expected = cached.loss(cached.rows.__getitems__([(n, n) for n in range(4)]), 0)[0]
    flow = Flow(rows)
    task = task_of(config, flow)
    assert (flow.rank, flow.world, flow.factor, flow.sizes) == (0, 1, 2, False)
    (batch,) = task.rows
    assert task.loss(batch, 0)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    expected = {name: loss for name, loss in cached.held_out().items() if name.startswith("held_out")}
    assert task.held_out() == pytest.approx(expected, rel=1e-5)
    assert sum("_at_" in name for name in expected) == LEVELS


def test_make_cache_makes_all_that_training_reads(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ahead, and alone: the run then opens no encoder but to tell what they are."""
    shared = str(tmp_path / "shared")
    config = config_of(parts, tmp_path / "run", random_flip=True).model_copy(update={"cache": Cache(dir=shared)})
    train, held_out = Squares(), Squares(4, seed=1)
    counts = make_cache(config, train, held_out, Accelerator(cpu=True))
    size = sum(x.stat().st_size for x in Path(shared).rglob("*.npy"))
    texts = len({t for rows in (train, held_out) for x in rows.texts for t in x}) + 1
    assert counts == {
        "pictures_made": 24 + 4, "pictures_taken_up": 0, "texts_made": texts, "texts_taken_up": texts, "bytes": size,
    }  # fmt: skip
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(VAE, "encode", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(TextEncoder, "encode", lambda *_, **__: pytest.fail("encoded again"))
    task_of(config, train, held_out, dir=shared)
    again = make_cache(config, train, held_out, Accelerator(cpu=True))
    assert again["pictures_made"] == again["texts_made"] == 0 and again["pictures_taken_up"] == 28
    monkeypatch.undo()
    other = config_of(parts, tmp_path / "other", "dit")  # another run, with a family of its own
    found = make_cache(other.model_copy(update={"cache": Cache(dir=shared)}), train, held_out, Accelerator(cpu=True))
    assert found["pictures_made"] == 0 and found["texts_made"] == texts
    json.dumps(found)


def test_first_distinct_looks_no_further_than_it_must():
    class Endless(list):
        def __iter__(self) -> Any:
            n = 0
            while True:
                yield f"{n // 2 % 3}"
                n += 1
                assert n <= 2000, "looked on"

    assert first_distinct(Endless(), 2) == ["0", "1"]
    assert first_distinct(["b", "a", "b", "c"], 3) == ["b", "a", "c"]
    assert np.all(first_distinct(["x"], 9) == ["x"])
