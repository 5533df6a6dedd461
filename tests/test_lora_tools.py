"""Merging, extracting and resizing LoRA, against the mathematics and against stock diffusers."""

import copy
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline
from safetensors.torch import load_file, save_file

from pipelines.convert import convert as convert_model
from pipelines.lora.algebra import joined, merged, norm, one_alpha, resized
from pipelines.lora.files import Layer, LoraFile, look_into, read_lora, write_lora
from pipelines.lora.info import info
from pipelines.lora.tools import convert, extract, merge, merge_into, resize
from tests import families, lora_made
from tests.lora_made import TEXT, UNET, apart, changed, quiet, weights

CLOSE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family's tiny stock pipeline."""
    place = tmp_path_factory.mktemp("bases")
    for family in lora_made.PIPES:
        lora_made.stock(family).save_pretrained(place / family)
    return {family: place / family for family in lora_made.PIPES}


def opened(folder: Path):
    with quiet():
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def tuned_by(lora: LoraFile, family: str, folder: Path) -> Path:
    """A folder of the tiny stock pipeline with the LoRA in its weights."""
    pipe = copy.deepcopy(lora_made.stock(family))
    with torch.no_grad():
        for component, layers in lora.components.items():
            new = changed(weights(getattr(pipe, component)), layers)
            for name, p in getattr(pipe, component).named_parameters():
                p.copy_(new[name.removeprefix("text_model.")])
    pipe.save_pretrained(folder)
    return folder


def wide(rank: int, seed: int = 0, out: int = 12, inside: tuple[int, ...] = (10,)) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    ends = (1, 1) * (len(inside) == 3)
    down = torch.randn((rank, *inside), generator=generator)
    return Layer(down, torch.randn((out, rank, *ends), generator=generator), 3.0)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [(10,), (5, 3, 3)])
def test_merging_is_the_sum(inside: tuple[int, ...]):
    weight = torch.randn(12, *inside)
    layers = [(wide(2, 1, inside=inside), 0.7), (wide(4, 2, inside=inside), -0.2)]
    want = weight.double()
    for x, w in layers:
        want = want + w * 3.0 / x.rank * torch.einsum(
            "or,ri->oi", x.up.double().flatten(1), x.down.double().flatten(1)
        ).view_as(weight)
    assert torch.equal(merged(weight, layers), want.float())  # rounded once
    both = joined(layers)
    assert both.rank == 6 and both.shape == tuple(weight.shape)
    torch.testing.assert_close(weight + both.delta(), want.float(), atol=1e-5, rtol=1e-5)


def test_a_dora_gives_rows_their_length():
    layer, weight = wide(2), torch.randn(12, 10)
    layer = Layer(layer.down, layer.up, 3.0, torch.rand(12) + 0.5)
    new = merged(weight, [(layer, 1.0)])
    torch.testing.assert_close(new.norm(dim=1), layer.magnitude)
    torch.testing.assert_close(torch.cosine_similarity(new, weight + layer.delta()), torch.ones(12))
    with pytest.raises(ValueError, match="a DoRA cannot be merged with others"):
        joined([(layer, 1.0), (wide(2), 1.0)])


@pytest.mark.parametrize("inside", [(10,), (5, 3, 3)])
def test_resizing_is_the_best_approximation(inside: tuple[int, ...]):
    """Eckart and Young: what is lost is the singular values that are left out, and no more."""
    layer = wide(6, inside=inside)
    s = torch.linalg.svdvals(layer.delta().double().flatten(1))
    for k in range(1, 7):
        small, kept = resized(layer, rank=k)
        assert small.rank == k and small.scale == pytest.approx(layer.scale) and small.shape == layer.shape
        lost = (small.delta().double() - layer.delta()).flatten(1).square().sum()
        assert float(lost) == pytest.approx(float(s[k:].square().sum()), abs=1e-6 * float(s[0] ** 2))
        assert kept == pytest.approx(float(s[:k].square().sum() / s.square().sum()), abs=1e-6)
    share = float(s[:3].square().sum() / s.square().sum())
    assert resized(layer, energy=share - 1e-4)[0].rank == 3 and resized(layer, energy=share + 1e-4)[0].rank == 4
    more = Layer(torch.cat([layer.down] * 2), torch.cat([layer.up] * 2, dim=1), 6.0)  # of rank 12 by name, 6 in truth
    back, kept = resized(more, rank=12)
    assert back.rank == 6 and kept == pytest.approx(1.0)
    torch.testing.assert_close(back.delta(), more.delta(), atol=1e-5, rtol=1e-5)


def test_a_rank_above_a_side_and_a_change_of_nothing():
    layer = wide(16, out=4)
    back, kept = resized(layer, rank=16)
    assert back.rank == 4 and kept == pytest.approx(1.0)
    torch.testing.assert_close(back.delta(), layer.delta(), atol=1e-5, rtol=1e-5)
    nothing, kept = resized(Layer(layer.down, 0 * layer.up, 3.0), rank=2)
    assert (nothing.rank, kept) == (1, 1.0) and not nothing.delta().any()


def test_one_alpha_and_the_norm():
    layers = {"a": wide(2), "b": wide(4), "c": Layer(wide(2).down, wide(2).up, 5.0)}
    for name, layer in one_alpha(layers).items():
        assert layer.alpha == 3.0
        torch.testing.assert_close(layer.delta(), layers[name].delta())
        assert norm(layer) == pytest.approx(float(layers[name].delta().norm()), rel=1e-5)


# --- into a base -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dora"), [("sd15", True), ("sdxl", False), ("sd3", False)])
def test_into_a_base_as_stock_fuses(family: str, dora: bool, base: dict[str, Path], tmp_path: Path):
    """Two LoRA with weights, one of them a DoRA: the folder, opened by stock, is stock's base with both fused."""
    pattern = UNET if family == "sd15" else "to_[qkv]$"
    first, second = lora_made.lora(family, pattern, dora=dora), lora_made.lora(family, "to_[qk]$", varied=True, seed=3)
    files = [write_lora(tmp_path / "a", first), write_lora(tmp_path / "b.safetensors", second)]
    target = merge_into(base[family], files, tmp_path / "out", weights=[0.8, -0.5])
    pipe, again = opened(base[family]), opened(target)
    with quiet():
        for name, file in zip("ab", files, strict=True):
            pipe.load_lora_weights(str(file), adapter_name=name)
        pipe.set_adapters(["a", "b"], [0.8, -0.5])
        pipe.fuse_lora(components=list(first.components), adapter_names=["a", "b"])
        pipe.unload_lora_weights()
    for name, part in lora_made.parts(family).items():
        want = changed(weights(part), first.components[name], 0.8)
        want = changed({n: x.float() for n, x in want.items()}, second.components[name], -0.5)
        assert apart(weights(getattr(again, name)), want) < 1e-6, name
        assert apart(weights(getattr(again, name)), weights(getattr(pipe, name))) < CLOSE, name
        assert apart(want, weights(part)) > 1e-2
    assert apart(weights(again.vae), weights(lora_made.stock(family).vae)) == 0


def test_in_half_precision_and_over_a_folder(base: dict[str, Path], tmp_path: Path):
    lora = lora_made.lora("sd15", text=None)
    target = merge_into(base["sd15"], [lora], tmp_path / "out", dtype="bf16")
    state = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    want = changed(weights(lora_made.parts("sd15")["unet"]), lora.components["unet"])
    assert {x.dtype for x in state.values()} == {torch.bfloat16}
    assert all(torch.equal(state[name], want[name].float().bfloat16()) for name in state)
    with pytest.raises(ValueError, match=r"out: is there already; --overwrite"):
        merge_into(base["sd15"], [lora], target)
    merge_into(base["sd15"], [lora], target, overwrite=True)
    assert load_file(target / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"].dtype == torch.float32
    with pytest.raises(ValueError, match="is the base; a merged one goes elsewhere"):
        merge_into(target, [lora], target, overwrite=True)


def test_kohyas_names_of_another_depth_and_a_pixart(base: dict[str, Path], tmp_path: Path):
    """The base's own names tell what kohya's stand for."""
    lora, names = lora_made.lora("sdxl", r"down_blocks.*to_k$", None), lora_made.module_names("sdxl")
    file = write_lora(tmp_path / "x.safetensors", lora, "kohya", base="sdxl", names=names)
    target = merge_into(base["sdxl"], [file], tmp_path / "a")
    want = changed(weights(lora_made.parts("sdxl")["unet"]), lora.components["unet"])
    assert apart(weights(opened(target).unet), want) < 1e-6
    pipe = families.pixart(PixArtSigmaPipeline)
    pipe.save_pretrained(tmp_path / "pixart")
    lora = LoraFile({"transformer": lora_made.layers(pipe.transformer, "to_q$")})
    target = merge_into(tmp_path / "pixart", [write_lora(tmp_path / "peft", lora, "peft")], tmp_path / "b")
    again = opened(target).transformer
    assert apart(weights(again), changed(weights(pipe.transformer), lora.components["transformer"])) < 1e-6
    with pytest.raises(ValueError, match=r"changes unet, and .*pixart has text_encoder, transformer"):
        merge_into(tmp_path / "pixart", [read_lora(file, names=names)], tmp_path / "c")


def test_numbers_that_are_none(base: dict[str, Path], tmp_path: Path):
    lora = lora_made.lora("sd15", "to_q$", None)
    name, layer = next(iter(lora.components["unet"].items()))
    layer.up[0, 0] = float("nan")
    for call in (
        lambda: merge_into(base["sd15"], [lora], tmp_path / "x"),
        lambda: resize(lora, tmp_path / "x", rank=1),
        lambda: merge([lora, lora], tmp_path / "x", rank=1),
    ):
        with pytest.raises(ValueError, match=rf"unet\.{name}: holds numbers that are not finite"):
            call()
    assert not list(tmp_path.iterdir())
    zero = Layer(torch.ones(1, 3), torch.zeros(2, 1), 1.0, torch.ones(2))  # a row of nothing has no direction
    assert torch.equal(merged(torch.zeros(2, 3), [(zero, 1.0)]), torch.zeros(2, 3))


def test_a_lora_of_another_model(base: dict[str, Path], tmp_path: Path):
    q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    for lora, said in (
        (lora_made.lora("sd3"), "LoRA 0: changes transformer, and .*sd15 has text_encoder, unet"),
        (lora_made.lora("sdxl"), r"LoRA 0: unet\..*attn2.to_k changes a weight of .*a LoRA of another model"),
        (LoraFile({"unet": {f"{q}x": wide(1)}}), rf"unet\.{q}x, and .*sd15 has none; the nearest name is {q}"),
        (LoraFile({"unet": {q: wide(1)}}), rf"unet\.{q} changes a weight of \(12, 10\), in .* it is \(16, 16\)"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_into(base["sd15"], [lora], tmp_path / "out")
    with pytest.raises(ValueError, match=r"no model_index\.json in it, so it is no pipeline folder"):
        merge_into(tmp_path, [lora_made.lora("sd15")], tmp_path / "out")
    with pytest.raises(ValueError, match="2 weights for 1 LoRA"):
        merge_into(base["sd15"], [lora_made.lora("sd15")], tmp_path / "out", weights=[1, 2])
    assert not list(tmp_path.iterdir())


# --- into one LoRA ---------------------------------------------------------------------------------------------------


def test_into_one_lora(tmp_path: Path):
    """Exactly, also of those layers that only one has; the sum of ranks; one alpha, so that any reader is right."""
    first, second = lora_made.lora("sd15"), lora_made.lora("sd15", r"to_[qk]$", text=None, varied=True, seed=3)
    files = [write_lora(tmp_path / "a.safetensors", first, trigger=["sks"]), write_lora(tmp_path / "b", second)]
    one = read_lora(merge(files, tmp_path / "out.safetensors", weights=[0.8, -0.5]))
    assert one.metadata["modelspec.trigger_phrase"] == "sks"
    for component, layers in one.components.items():
        assert len({layer.alpha for layer in layers.values()}) == 1
        for name, layer in layers.items():
            want = 0.8 * first.components[component][name].delta()
            rank = 2
            if other := second.components.get(component, {}).get(name):
                want, rank = want - 0.5 * other.delta(), rank + other.rank
            assert layer.rank == rank
            torch.testing.assert_close(layer.delta(), want, atol=1e-6, rtol=1e-5)
    exact = merge(files, tmp_path / "same.safetensors", weights=[0.8, -0.5], rank=99)
    for name, layer in read_lora(exact).layers().items():
        torch.testing.assert_close(layer.delta(), one.layers()[name].delta(), atol=1e-6, rtol=1e-5)
    small = read_lora(merge(files, tmp_path / "small.safetensors", rank=1))
    assert {layer.rank for layer in small.layers().values()} == {1}


def test_what_is_not_merged_into_one(tmp_path: Path):
    dora, sdxl, other = lora_made.lora("sd15", dora=True), lora_made.lora("sdxl"), lora_made.lora("sd15")
    q = next(iter(other.components["unet"]))
    odd = LoraFile({"unet": {q: wide(1)}})
    for files, said in (
        ([other, dora], rf"unet\.{q}: a DoRA cannot be merged"),
        ([other, odd], rf"unet\.{q}: one changes a weight of .*, another one of \(12, 10\)"),
        ([lora_made.lora("sd3"), sdxl], "LoRA of different models: sd3, sdxl|one changes a weight"),
        ([], "no LoRA to merge"),
    ):
        with pytest.raises(ValueError, match=said):
            merge(files, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="rank is 0"):
        merge([other], tmp_path / "x.safetensors", rank=0)
    assert not list(tmp_path.iterdir())


# --- out of two models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_out_of_a_difference(family: str, base: dict[str, Path], tmp_path: Path):
    """base + LoRA of rank 2, taken apart again at rank 2, is that LoRA; stock loads it."""
    lora = lora_made.lora(family)
    tuned = tuned_by(lora, family, tmp_path / "tuned")
    made = extract(base[family], tuned, tmp_path / "x.safetensors", rank=2)
    again = read_lora(made.path)
    assert again.layers().keys() == lora.layers().keys() and not made.left_out
    for name, layer in again.layers().items():
        assert layer.rank == 2 and made.kept[name][0] == 2
        assert (layer.delta() - lora.layers()[name].delta()).abs().max() < CLOSE
    assert made.energy > 0.9999
    if family == "sd15":
        pipe = opened(base[family])
        with quiet():
            pipe.load_lora_weights(str(made.path), adapter_name="a")
            pipe.fuse_lora(components=list(lora.components))
            pipe.unload_lora_weights()
        for name in lora.components:
            assert apart(weights(getattr(pipe, name)), weights(getattr(opened(tuned), name))) < CLOSE


def test_by_energy_and_what_no_lora_holds(base: dict[str, Path], tmp_path: Path):
    tuned = copy.deepcopy(lora_made.stock("sd15"))
    with torch.no_grad():
        for name, p in tuned.unet.named_parameters():
            if re.search(r"(to_q\.weight|conv_norm_out\.bias)$", name):
                p.add_(0.1 * torch.randn_like(p))
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract(base["sd15"], tmp_path / "tuned", tmp_path / "x.safetensors", energy=0.8, components=["unet"])
    assert made.left_out == ("unet.conv_norm_out.bias",)
    assert all(share >= 0.8 for _, share in made.kept.values()) and 0.8 < made.energy < 1
    lora = read_lora(made.path)
    before, after = weights(lora_made.parts("sd15")["unet"]), weights(tuned.unet)
    lost = whole = 0.0
    for name, layer in lora.components["unet"].items():
        delta = after[f"{name}.weight"] - before[f"{name}.weight"]
        lost, whole = lost + float((delta - layer.delta()).square().sum()), whole + float(delta.square().sum())
    assert made.energy == pytest.approx(1 - lost / whole, abs=1e-5)
    both = extract(base["sd15"], tmp_path / "tuned", tmp_path / "y.safetensors", energy=0.99, rank=2)
    assert max(rank for rank, _ in both.kept.values()) == 2


def test_out_of_single_files(base: dict[str, Path], tmp_path: Path):
    """The names of both kinds are brought together; Stable Diffusion 3's fused layers too."""
    lora = lora_made.lora("sd3")
    convert_model(tuned_by(lora, "sd3", tmp_path / "tuned"), tmp_path / "tuned.safetensors")
    for one in (base["sd3"], convert_model(base["sd3"], tmp_path / "base.safetensors")):
        made = extract(one, tmp_path / "tuned.safetensors", tmp_path / "x.safetensors", rank=2, overwrite=True)
        found = read_lora(made.path).layers()
        assert found.keys() == lora.layers().keys()
        for name, layer in found.items():
            assert (layer.delta() - lora.layers()[name].delta()).abs().max() < CLOSE, name


def test_what_is_not_extracted(base: dict[str, Path], tmp_path: Path):
    sd, out = base["sd15"], tmp_path / "x.safetensors"
    for original, tuned, options, said in (
        (sd, sd, {}, "give a rank, or the share of the energy"),
        (sd, sd, {"rank": 0}, "rank is 0; a LoRA has rank 1 at least"),
        (sd, sd, {"energy": 1.5}, r"energy is 1\.5; expected a share"),
        (sd, sd, {"rank": 1}, "no linear or convolution layer differs"),
        (sd, base["sdxl"], {"rank": 1}, r"unet\..*; both must be of one architecture"),
        (sd, base["sd3"], {"rank": 1, "components": ["unet"]}, "sd3: has no unet; it has transformer"),
        (sd, tmp_path / "none", {"rank": 1}, "none: no such file or folder"),
    ):
        with pytest.raises(ValueError, match=said):
            extract(original, tuned, out, **options)
    save_file({"x": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="not a layout known here"):
        extract(tmp_path / "y.safetensors", sd, out, rank=1)
    assert not out.exists()


# --- resize, convert, info -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_resize_keeps_form_metadata_and_lengths(format: str, tmp_path: Path):
    lora = LoraFile(lora_made.lora("sd15", UNET, TEXT, dora=True).components, {"ss_learning_rate": "1"})
    named = tmp_path / ("a" if format == "peft" else "a.safetensors")
    file = write_lora(named, lora, format, base="sd15")
    made = resize(file, tmp_path / named.name.replace("a", "b", 1), rank=2)
    assert look_into(made.path)[1] == format and made.energy == pytest.approx(1.0)
    same = read_lora(made.path)
    assert same.metadata["ss_learning_rate"] == "1"
    for name, layer in same.layers().items():
        known = lora.layers()[name]
        torch.testing.assert_close(layer.delta(), known.delta(), atol=1e-6, rtol=1e-5)
        assert layer.scale == known.scale and torch.equal(layer.magnitude, known.magnitude)
    half = resize(file, tmp_path / named.name.replace("a", "c", 1), rank=1)
    assert {rank for rank, _ in half.kept.values()} == {1} and 0.5 < half.energy < 1
    with pytest.raises(ValueError, match="give a rank"):
        resize(file, tmp_path / "d.safetensors")


def test_info(tmp_path: Path):
    lora = lora_made.lora("sd15", varied=True)
    file = write_lora(tmp_path / "x.safetensors", lora, "kohya", base="sd15", dtype="bf16", trigger=["sks dog"])
    found = info(file, norms=True)
    assert (found.format, found.base, found.dtypes, found.triggers) == ("kohya", "sd15", ("bfloat16",), ["sks dog"])
    unet, layers = found.components["unet"], lora.components["unet"]
    assert unet.layers == len(layers) and sum(unet.ranks.values()) == sum(unet.alphas.values()) == len(layers)
    assert unet.convolutions == sum(layer.down.ndim == 4 for layer in layers.values()) > 0
    assert unet.parameters == sum(layer.down.numel() + layer.up.numel() for layer in layers.values())
    sizes = {name: float(layer.delta().norm()) for name, layer in layers.items()}
    assert unet.norm == pytest.approx(sum(x * x for x in sizes.values()) ** 0.5, rel=1e-2)  # bf16 holds 3 digits
    assert unet.largest is not None and unet.largest[0] == max(sizes, key=lambda name: sizes[name])
    assert info(file).components["unet"].norm is None


def test_convert_refuses(tmp_path: Path):
    with pytest.raises(ValueError, match="format 'safetensors' is not one of"):
        convert(lora_made.lora("sd15"), tmp_path / "x.safetensors", "safetensors")  # type: ignore[arg-type]
