"""What every network shares: the attention switch, gradient checkpointing, and what is refused on the way in."""

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from ldm.cond import Cond
from ldm.models.base import Network, likely_model
from ldm.models.dit import DiT
from ldm.models.mmdit import MMDiT
from ldm.models.unet import UNet
from ldm.models.vae import VAE


def dit() -> DiT:
    config = dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8,
        cross_attention_dim=16, caption_channels=tiny.WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    return tiny.randomize(DiT(**config), 5, 0.08)


MAKE: dict[str, Callable[[], Network]] = {"unet": tiny.unet, "vae": tiny.vae, "mmdit": tiny.mmdit, "dit": dit}
ATTENTIONS = {"unet": 8, "vae": 2, "mmdit": 3, "dit": 8}


def call(net: Network) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(net.dtype)

    if isinstance(net, VAE):
        return net(draw(2, 3, 16, 16), draw(2, 4, 8, 8))[0]
    width = tiny.JOINT if isinstance(net, MMDiT) else tiny.WIDTH
    cond = Cond(draw(2, 5, width), torch.tensor([[0.0] * 5, [0.0, 1.5, 0.0, -torch.inf, -torch.inf]]))
    if isinstance(net, MMDiT):
        cond = Cond(cond.tokens, cond.bias, pooled=draw(2, tiny.POOLED + 2))
    return net(draw(2, 4, 8, 8), torch.tensor([3.0, 700.0]), cond)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_the_switch_reaches_every_attention(name, monkeypatch):
    """xFormers is played by its documented equivalent, which counts its calls."""
    calls = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        calls.append(q.shape)
        logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        logits = logits if attn_bias is None else logits + attn_bias
        return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, stand_in
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    net = MAKE[name]().double()
    with torch.no_grad():
        truth = call(net)
        for backend in ("plain", "sdpa"):
            net.set_attention_backend(backend)
            torch.testing.assert_close(call(net), truth, rtol=1e-10, atol=1e-12)
        with pytest.raises(RuntimeError, match="need a CUDA device"):
            net.enable_xformers_memory_efficient_attention()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        net.enable_xformers_memory_efficient_attention()
        torch.testing.assert_close(call(net), truth, rtol=1e-10, atol=1e-12)
        assert len(calls) == ATTENTIONS[name]
        net.disable_xformers_memory_efficient_attention()
        call(net)
        assert len(calls) == ATTENTIONS[name]
    with pytest.raises(ValueError, match="attention_op"):
        net.enable_xformers_memory_efficient_attention(attention_op=print)


@pytest.mark.parametrize("name", MAKE)
def test_a_backend_that_cannot_run_changes_nothing(name, monkeypatch):
    net = MAKE[name]()
    monkeypatch.setitem(sys.modules, "xformers", None)
    net.set_attention_backend("plain")
    with pytest.raises(RuntimeError, match="'xformers' cannot be imported"):
        net.set_attention_backend("xformers")
    with pytest.raises(ValueError, match="'flashy' is not one of auto, xformers, flash"):
        net.set_attention_backend("flashy")
    assert {m.backend for m in net.modules() if hasattr(m, "backend")} == {"plain"}


def test_heads_too_wide_are_refused_when_the_backend_is_set(monkeypatch):
    """The autoencoder has one head as wide as its innermost level: 512 in Stable Diffusion's."""
    with torch.device("meta"):
        net = VAE(block_out_channels=(32, 512))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ValueError, match="heads 512 wide, it takes 256 at most"):
        net.set_attention_backend("flash")
    assert {m.backend for m in net.modules() if hasattr(m, "backend")} == {"auto"}


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_blocks_are_what_forward_recomputes(name, monkeypatch):
    net, seen = MAKE[name](), []
    monkeypatch.setattr(Network, "run_block", lambda self, block, *args: (seen.append(block), block(*args))[1])
    call(net)
    assert set(seen) == set(net.blocks())
    assert len(seen) == len(net.blocks()) > 2


@pytest.mark.parametrize("name", MAKE)
def test_recomputing_changes_no_gradient_and_saves_memory_by_its_share(name):
    """Bit-equal: the same kernels run on the same numbers. Memory is what autograd keeps beside the weights."""
    net = MAKE[name]()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    results, kept = [], []
    for fraction in (0.0, 0.34, 0.67, 1.0):
        net.enable_gradient_checkpointing(fraction) if fraction else net.disable_gradient_checkpointing()
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            s = t.untyped_storage()
            if s.data_ptr() not in weights:
                storages[s.data_ptr()] = s.nbytes()
            return t

        net.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = call(net)
        kept.append(sum(storages.values()))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + len(list(net.parameters()))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert kept[3] < 0.5 * kept[0]


def test_the_share_is_spread_over_the_depth():
    with torch.device("meta"):
        net = MMDiT(num_layers=12, num_attention_heads=1, attention_head_dim=8, caption_projection_dim=8)
    for fraction, recomputed in (
        (1.0, list(range(12))), (0.5, [1, 3, 5, 7, 9, 11]), (0.25, [3, 7, 11]), (0.01, [11]), (1, list(range(12))),
    ):  # fmt: skip
        net.enable_gradient_checkpointing(fraction)
        for model in (net, copy.deepcopy(net)):  # an average of the weights is a copy
            assert [i for i, block in enumerate(model.transformer_blocks) if block.recompute] == recomputed
    for wrong in (0, -0.5, 1.5, None, float("nan"), "all"):
        with pytest.raises(ValueError, match="expected above 0 and at most 1"):
            net.enable_gradient_checkpointing(wrong)


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    net = MAKE["mmdit"]()
    net.enable_gradient_checkpointing()
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", None)
    with torch.no_grad():
        call(net)
    with pytest.raises(TypeError):
        call(net)


def test_recomputing_compiles_as_one_graph():
    net = tiny.mmdit(num_layers=2)
    net.enable_gradient_checkpointing(0.5)
    expected = call(net)
    net.compile(backend="eager", fullgraph=True)
    assert torch.equal(call(net), expected)


# --- weights of another model ----------------------------------------------------------------------------------------


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def named(*keys: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: dict.fromkeys(keys, torch.zeros(1))


T5_CONFIG = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
LORA = named("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight")
SINGLE_FILE = named("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight")
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "unet": (tiny.unet, "UNet2DConditionModel"),
    "vae": (tiny.vae, "AutoencoderKL"),
    "mmdit": (tiny.mmdit, "SD3Transformer2DModel"),
    "dit": (dit, "PixArtTransformer2DModel"),
    "flux": (flux, "FluxTransformer2DModel"),
    "clip": (lambda: CLIPTextModel(tiny.text_config()), "CLIPTextModel"),
    "t5": (lambda: T5EncoderModel(T5_CONFIG), "T5EncoderModel"),
    "lora": (LORA, "LoRA"),
    "kohya": (named("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), "LoRA"),
    "single_file": (SINGLE_FILE, "ldm convert"),
    "original_vae": (named("decoder.mid.block_1.norm1.weight"), "original authors' autoencoder"),
    "wrapped": (lambda: {f"module.{k}": v for k, v in tiny.unet().state_dict().items()}, "inside a wrapper"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", MAKE)
def test_weights_of_another_model_are_known_by_their_names(name, other):
    made, likely = OTHERS[other][0](), OTHERS[other][1]
    state = dict(made.state_dict()) if isinstance(made, torch.nn.Module) else made
    net = MAKE[name]()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    if name == other:
        net.load_state_dict(state)
        return
    with pytest.raises(ValueError) as caught:
        net.load_state_dict(state)
    said = str(caught.value)
    absent, extra = [k for k in before if k not in state], [k for k in state if k not in before]
    assert likely in said and type(net).__name__ in said
    assert f"{len(absent)} of {len(before)} missing, the first {', '.join(absent[:3])};" in said
    assert f"{len(extra)} left over, the first {', '.join(extra[:3])}." in said
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_weights_of_another_config_are_refused():
    net = tiny.unet()
    with pytest.raises(ValueError, match=r"missing.*They look like another config of UNet2DConditionModel"):
        tiny.unet(layers_per_block=2).load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match=r"differ, in 1 of \d+; conv_in.weight: \(8, 4, 3, 3\) for \(8, 9, 3, 3\)"):
        tiny.unet(in_channels=9).load_state_dict(net.state_dict())
    assert tiny.unet().load_state_dict({}, strict=False).missing_keys
    assert likely_model(["a.weight"]) is None


@pytest.mark.parametrize("name", MAKE)
def test_a_stock_model_of_another_class_is_refused(name):
    net = MAKE[name]()
    for other in MAKE:
        if other == name:
            continue
        theirs = MAKE[other]().to_diffusers()
        with pytest.raises(ValueError, match=f"takes a {net.stock}, .* not a {type(theirs).__name__}"):
            type(net).from_diffusers(theirs)
    with pytest.raises(ValueError, match=r"not a dict .its keys look like a LoRA"):
        type(net).from_diffusers(LORA())


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Each model as the stock class saves it: in one file, in shards, in half precision, and both."""
    root = tmp_path_factory.mktemp("folders")
    for name, make in MAKE.items():
        model: Any = make().to_diffusers()
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name}-shards", max_shard_size="20KB")
        model.half()
        model.save_pretrained(root / f"{name}-fp16", variant="fp16")
        model.save_pretrained(root / f"{name}-both", variant="fp16", max_shard_size="10KB")
    return root


@pytest.mark.parametrize("name", MAKE)
def test_folders_as_people_have_them(folders, name):
    net, cls = MAKE[name](), type(MAKE[name]())
    half = {k: v.half() for k, v in net.state_dict().items()}
    assert len(list((folders / f"{name}-shards").glob("*.safetensors"))) > 2
    for form, kw, dtype, state in (
        ("", {}, torch.float32, net.state_dict()),
        ("-shards", {}, torch.float32, net.state_dict()),
        ("-fp16", {"variant": "fp16", "dtype": torch.float16}, torch.float16, half),
        ("-both", {"variant": "fp16"}, torch.float32, half),
        ("", {"dtype": torch.float16}, torch.float16, half),
    ):
        for source, sub in ((folders / f"{name}{form}", {}), (str(folders), {"subfolder": f"{name}{form}"})):
            again = cls.from_diffusers(source, **kw, **sub)
            assert again.dtype is dtype and not again.training
            assert again.config.keys() == net.config.keys()
            assert all(torch.equal(v, state[k].to(dtype)) for k, v in again.state_dict().items())


def test_folders_that_lack_something(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected one that holds UNet2DCondition"):
        UNet.from_diffusers(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        UNet.from_diffusers("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json of a UNet2DConditionModel in it$"):
        UNet.from_diffusers(tmp_path)
    with pytest.raises(NotADirectoryError, match="`ldm convert` makes one of a single file"):
        UNet.from_diffusers(folders / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "net": ["diffusers", UNet.stock]}))
    with pytest.raises(FileNotFoundError, match="a whole pipeline, whose UNet2DConditionModel is in subfolder='net'"):
        UNet.from_diffusers(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model.safetensors.*there is variant='fp16'"):
        UNet.from_diffusers(folders / "unet-fp16")
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model.safetensors.*there is variant='fp16'"):
        UNet.from_diffusers(folders / "unet-both")
    with pytest.raises(
        FileNotFoundError, match=r"no diffusion_pytorch_model\.fp16\.safetensors in it, but diffusion_pyt"
    ):
        UNet.from_diffusers(folders / "unet", variant="fp16")
    with pytest.raises(ValueError, match="dtype='float16': expected one of torch's"):
        UNet.from_diffusers(folders / "unet", dtype="float16")


def copied(
    source: Path, target: Path, weights: Callable[[dict[str, Tensor]], Any] | None = None, **config: Any
) -> Path:
    """A folder with other config fields, and weights that were tampered with."""
    target.mkdir()
    fields = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(fields))
    state = load_file(source / "diffusion_pytorch_model.safetensors")
    if weights:
        weights(state)
    save_file(state, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return target


def test_folders_that_hold_something_else(folders, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"one of AutoencoderKL, UNet takes UNet2DConditionModel: ldm\.VAE takes"):
        UNet.from_diffusers(folders / "vae")
    missing = copied(folders / "unet", tmp_path / "a", lambda state: state.pop("mid_block.resnets.1.conv2.bias"))
    with pytest.raises(ValueError, match=r"1 of \d+ missing, the first mid_block\.resnets\.1\.conv2\.bias\. "):
        UNet.from_diffusers(missing)
    extra = copied(folders / "unet", tmp_path / "b", lambda state: state.update(odd=torch.zeros(1)))
    with pytest.raises(ValueError, match="fit: 1 left over, the first odd"):
        UNet.from_diffusers(extra)
    assert not caplog.messages  # stock would have listed every name

    def swap(state: dict[str, Tensor]) -> None:
        state.clear()
        state.update(load_file(folders / "vae" / "diffusion_pytorch_model.safetensors"))

    with pytest.raises(ValueError, match=r"missing, the first conv_in.*left over.*They look like AutoencoderKL"):
        UNet.from_diffusers(copied(folders / "unet", tmp_path / "c", swap))
    with pytest.raises(ValueError, match=r"d: Cannot load .*conv_in.*expected shape .*16.*got .*8"):
        UNet.from_diffusers(copied(folders / "unet", tmp_path / "d", block_out_channels=[16, 16]))
    shards = tmp_path / "e"
    shards.mkdir()
    for file in (folders / "unet-shards").iterdir():
        if "-00002-of-" not in file.name:
            (shards / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="-00002-of-"):
        UNet.from_diffusers(shards)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_num_group": 2}, "norm_num_group=2 is unknown to UNet2DConditionModel; did you mean norm_num_groups?"),
        ({"flux_capacity": 1.21}, "flux_capacity=1.21 is unknown to UNet2DConditionModel$"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act=True is not supported by UNet"),
        ({"attention_head_dim": 3}, "no multiple of its 3 heads"),
    ],
)
def test_configs_with_unknown_or_contradictory_fields(folders, tmp_path, config, message):
    folder = copied(folders / "unet", tmp_path / "x", **config)
    with pytest.raises(ValueError, match=message):
        UNet.from_diffusers(folder)


def test_fields_that_are_off_or_private_pass(folders, tmp_path):
    folder = copied(folders / "unet", tmp_path / "x", num_vector_embeds=None, double_self_attention=False, _note="mine")
    assert torch.equal(call(UNet.from_diffusers(folder)), call(tiny.unet()))


def test_pixarts_first_name_for_its_class(folders, tmp_path):
    """As PixArt-α's own folders have it; stock opens it too."""
    folder = copied(folders / "dit", tmp_path / "x", _class_name="Transformer2DModel", norm_type="ada_norm_single")
    assert torch.equal(call(DiT.from_diffusers(folder)), call(dit()))
    with pytest.raises(ValueError, match="one of PixArtTransformer2DModel"):
        UNet.from_diffusers(folder)


def test_a_stock_model_that_misses_weights_is_refused():
    """What `from_pretrained` leaves on the meta device where a file lacks a weight."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**tiny.unet().stock_config())
    with pytest.raises(ValueError, match="would stay without a value"):
        UNet.from_diffusers(model)
