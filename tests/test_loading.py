"""The way in from stock models, weights and folders: what is taken, and what is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from ldm.models.dit import DiT
from ldm.models.loading import likely_model
from ldm.models.unet import UNet
from tests import tiny
from tests.twins import NETWORKS, call

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
    "mmdit": (NETWORKS["mmdit"], "SD3Transformer2DModel"),
    "dit": (NETWORKS["dit"], "PixArtTransformer2DModel"),
    "flux": (flux, "FluxTransformer2DModel"),
    "clip": (lambda: CLIPTextModel(tiny.text_config()), "CLIPTextModel"),
    "t5": (lambda: T5EncoderModel(T5_CONFIG), "T5EncoderModel"),
    "lora": (LORA, "LoRA"),
    "kohya": (named("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), "LoRA"),
    "single_file": (SINGLE_FILE, "ldm convert"),
    "original_vae": (named("decoder.mid.block_1.norm1.weight"), "original authors' autoencoder"),
    "training": (named("state_dict", "epoch"), "a training checkpoint: take the entry"),
    "wrapped": (lambda: {f"module.{k}": v for k, v in tiny.unet().state_dict().items()}, "inside a wrapper"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_another_model_are_known_by_their_names(name, other):
    made, likely = OTHERS[other][0](), OTHERS[other][1]
    state = dict(made.state_dict()) if isinstance(made, torch.nn.Module) else made
    net = NETWORKS[name]()
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
    with pytest.raises(ValueError, match=r"differ, in 1 of \d+; conv_in.weight: list for \(8, 4, 3, 3\)"):
        tiny.unet().load_state_dict(net.state_dict() | {"conv_in.weight": [1.0]})
    assert likely_model(["a.weight"]) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stock_model_of_another_class_is_refused(name):
    net = NETWORKS[name]()
    for other in NETWORKS:
        if other == name:
            continue
        theirs = NETWORKS[other]().to_diffusers()
        with pytest.raises(ValueError, match=f"takes a {net.stock}, .* not a {type(theirs).__name__}"):
            type(net).from_diffusers(theirs)
    with pytest.raises(ValueError, match=r"not a dict .its keys look like a LoRA"):
        type(net).from_diffusers(LORA())
    with pytest.raises(ValueError, match="dtype is for folders and hub names, not for models"):
        type(net).from_diffusers(net.to_diffusers(), dtype=torch.float16)


def test_what_no_file_holds_goes_along():
    """A table that is not among the weights is the same tensor on both sides, on whatever device and in any dtype."""
    stock: Any = NETWORKS["dit"]().to_diffusers().half()
    ours = DiT.from_diffusers(stock)
    assert "pos_embed.pos_embed" not in ours.state_dict()
    assert ours.pos_embed.pos_embed.dtype == torch.float16
    assert ours.pos_embed.pos_embed is stock.pos_embed.pos_embed is ours.to_diffusers().pos_embed.pos_embed
    with torch.device("meta"):
        empty = DiT(**ours.config)
    with pytest.raises(ValueError, match=r"pos_embed.* would stay without a value; load the weights first"):
        empty.to_diffusers()


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Each model as the stock class saves it: in one file, in shards, in half precision, and both."""
    root = tmp_path_factory.mktemp("folders")
    for name, make in NETWORKS.items():
        model: Any = make().to_diffusers()
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name}-shards", max_shard_size="20KB")
        model.half()
        model.save_pretrained(root / f"{name}-fp16", variant="fp16")
        model.save_pretrained(root / f"{name}-both", variant="fp16", max_shard_size="10KB")
    return root


@pytest.mark.parametrize("name", NETWORKS)
def test_folders_as_people_have_them(folders, name):
    net, cls = NETWORKS[name](), type(NETWORKS[name]())
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
    with pytest.raises(ValueError, match=r"unknown argument torch_dtype: expected dtype$"):
        UNet.from_diffusers(folders / "unet", torch_dtype=torch.float16)
    with pytest.raises(OSError, match=r"o/n: no such folder, and not opened as a name on the hub: .*offline mode"):
        UNet.from_diffusers("o/n")


def test_files_that_are_cut_or_not_listed(folders, tmp_path):
    shards, cut = tmp_path / "shards", tmp_path / "cut"
    shutil.copytree(folders / "unet-shards", shards)
    (shards / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"shards need diffusion_pytorch_model.safetensors.index.json beside"):
        UNet.from_diffusers(shards)
    shutil.copytree(folders / "unet", cut)
    file = cut / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"cut: the weights do not open; fetch them anew\..*file not fully covered"):
        UNet.from_diffusers(cut)
    (cut / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected a JSON object"):
        UNet.from_diffusers(cut)
    (cut / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"cut: the config does not open: .*not a valid JSON"):
        UNet.from_diffusers(cut)


def test_shards_of_a_variant_under_their_first_name(folders, tmp_path):
    """As diffusers once wrote it, and still reads it."""
    old = tmp_path / "old"
    shutil.copytree(folders / "unet-both", old)
    index = old / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(old / "diffusion_pytorch_model.safetensors.fp16.index.json")
    again = UNet.from_diffusers(old, variant="fp16")
    assert all(torch.equal(v.float(), again.state_dict()[k]) for k, v in tiny.unet().half().state_dict().items())


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
        ({"flux_capacity": 1.21}, "flux_capacity=1.21 is unknown to UNet2DConditionModel; take it out if"),
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
    assert torch.equal(call(DiT.from_diffusers(folder)), call(NETWORKS["dit"]()))
    with pytest.raises(ValueError, match="one of PixArtTransformer2DModel"):
        UNet.from_diffusers(folder)


def test_a_stock_model_that_misses_weights_is_refused():
    """What `from_pretrained` leaves on the meta device where a file lacks a weight."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**tiny.unet().stock_config())
    with pytest.raises(ValueError, match="would stay without a value"):
        UNet.from_diffusers(model)
