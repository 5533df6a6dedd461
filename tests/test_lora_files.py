"""Names, numbers and metadata of LoRA files, and what is refused."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines.lora import kohya
from pipelines.lora.files import Layer, LoraFile, family_of, look_into, read_lora, write_lora
from tests import lora_made

DOWN, UP = torch.randn(2, 6), torch.randn(4, 2)
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def small(**kw) -> LoraFile:
    return LoraFile({"unet": {Q: Layer(DOWN, UP, 3.0)}}, **kw)


def saved(file: Path, state: dict, metadata: dict | None = None) -> Path:
    save_file({name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}, file, metadata)
    return file


def headers(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as f:
        return f.metadata()


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "component", "module"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "unet", Q),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0", "unet",
         "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0"),
        ("lora_unet_up_blocks_1_resnets_2_conv_shortcut", "unet", "up_blocks.1.resnets.2.conv_shortcut"),
        ("lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj", "unet",
         "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"),
        ("lora_unet_time_embedding_linear_1", "unet", "time_embedding.linear_1"),
        # SDXL as kohya names it, of the published layout
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "unet",
         "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("lora_unet_input_blocks_8_1_proj_in", "unet", "down_blocks.2.attentions.1.proj_in"),
        ("lora_unet_middle_block_1_transformer_blocks_9_ff_net_2", "unet",
         "mid_block.attentions.0.transformer_blocks.9.ff.net.2"),
        ("lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v", "unet",
         "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_v"),
        ("lora_unet_output_blocks_2_2_conv", "unet", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_input_blocks_3_0_op", "unet", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_input_blocks_1_0_emb_layers_1", "unet", "down_blocks.0.resnets.0.time_emb_proj"),
        ("lora_unet_label_emb_0_2", "unet", "add_embedding.linear_2"),
        # text encoders
        ("lora_te_text_model_encoder_layers_11_self_attn_q_proj", "text_encoder", "encoder.layers.11.self_attn.q_proj"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder", "encoder.layers.0.mlp.fc1"),
        ("lora_te2_text_model_encoder_layers_31_self_attn_out_proj", "text_encoder_2",
         "encoder.layers.31.self_attn.out_proj"),
        ("lora_te2_text_projection", "text_encoder_2", "text_projection"),
        ("lora_te3_encoder_block_3_layer_1_DenseReluDense_wi_0", "text_encoder_3",
         "encoder.block.3.layer.1.DenseReluDense.wi_0"),
        # Stable Diffusion 3 as OneTrainer and as sd-scripts name it
        ("lora_transformer_transformer_blocks_7_attn_add_q_proj", "transformer",
         "transformer_blocks.7.attn.add_q_proj"),
        ("lora_unet_joint_blocks_7_context_block_attn_proj", "transformer", "transformer_blocks.7.attn.to_add_out"),
        ("lora_unet_joint_blocks_0_x_block_mlp_fc1", "transformer", "transformer_blocks.0.ff.net.0.proj"),
    ],
)  # fmt: skip
def test_kohya_names(key: str, component: str, module: str, tmp_path: Path):
    state = {f"{key}.lora_down.weight": DOWN, f"{key}.lora_up.weight": UP, f"{key}.alpha": torch.tensor(0.3)}
    lora = read_lora(saved(tmp_path / "x.safetensors", state))
    assert list(lora.components) == [component] and list(lora.components[component]) == [module]
    layer = lora.components[component][module]
    assert torch.equal(layer.down, DOWN) and torch.equal(layer.up, UP)
    assert layer.scale == torch.tensor(0.3).item() / 2


def test_every_module_of_stock_networks_has_a_kohya_name_and_back():
    for family in ("sd15", "sdxl", "sd3"):
        names = lora_made.module_names(family)
        for component, layers in lora_made.lora(family, ".").components.items():
            keys = {module: kohya.kohya_name(component, module, family, names) for module in layers}
            assert len(set(keys.values())) == len(keys)
            for module, key in keys.items():
                assert kohya.place(key, names)[:2] == (component, (module,))
                if family != "sdxl":  # whose depth is not the published one here
                    assert kohya.place(key)[:2] == (component, (module,))


def test_published_sdxl_is_named_as_kohya_names_it():
    """The counts are those of the published UNet: 70 transformer blocks, 17 resnets."""
    table = kohya._published("sdxl")
    stock = [modules[0] for modules, _ in table.values()]
    assert sum(name.endswith("attn1.to_q") for name in stock) == 10 * 11  # up to 10 deep in 11 places
    assert sum(name.endswith("conv1") for name in stock) == 17
    assert (
        kohya.kohya_name("unet", "up_blocks.0.attentions.2.proj_out", "sdxl") == "lora_unet_output_blocks_2_1_proj_out"
    )


def test_stable_diffusion_3_in_one_layer_is_taken_apart(tmp_path: Path):
    """sd-scripts has queries, keys and values in one layer, and the last modulation's halves the other way round."""
    transformer = lora_made.parts("sd3")["transformer"]
    names = {"transformer": [name for name, _ in transformer.named_modules()]}
    last = len(transformer.transformer_blocks) - 1
    qkv, up = torch.randn(2, 24), torch.randn(72, 2)
    swapped, plain = torch.randn(48, 2), torch.randn(144, 2)
    state = {}
    for key, tensor in (
        ("joint_blocks_1_x_block_attn_qkv", up),
        (f"joint_blocks_{last}_context_block_adaLN_modulation_1", swapped),
        ("joint_blocks_0_context_block_adaLN_modulation_1", plain),
    ):
        state |= {f"lora_unet_{key}.lora_down.weight": qkv, f"lora_unet_{key}.lora_up.weight": tensor}
    for known in (names, None):  # with the depth told, and by the shapes
        found = read_lora(saved(tmp_path / "x.safetensors", state), names=known).components["transformer"]
        for i, x in enumerate("qkv"):
            layer = found[f"transformer_blocks.1.attn.to_{x}"]
            assert torch.equal(layer.up, up[24 * i : 24 * i + 24]) and torch.equal(layer.down, qkv) and layer.scale == 1
        assert torch.equal(
            found[f"transformer_blocks.{last}.norm1_context.linear"].up, torch.cat([swapped[24:], swapped[:24]])
        )
        assert torch.equal(found["transformer_blocks.0.norm1_context.linear"].up, plain)


@pytest.mark.parametrize(
    ("down", "up", "component", "module"),
    [
        (f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight", "unet", Q),
        (f"base_model.model.{Q}.lora_A.default.weight", f"base_model.model.{Q}.lora_B.default.weight", "unet", Q),
        (f"unet.{Q}.lora.down.weight", f"unet.{Q}.lora.up.weight", "unet", Q),
        (f"unet.{Q[:-5]}.processor.to_q_lora.down.weight", f"unet.{Q[:-5]}.processor.to_q_lora.up.weight", "unet", Q),
        (f"{Q[:-5]}.processor.to_out_lora.down.weight", f"{Q[:-5]}.processor.to_out_lora.up.weight", "unet",
         f"{Q[:-5]}.to_out.0"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight", "text_encoder",
         "encoder.layers.0.self_attn.q_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight", "text_encoder",
         "encoder.layers.0.self_attn.out_proj"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
         "transformer.transformer_blocks.0.attn.to_q.lora_B.weight", "transformer", "transformer_blocks.0.attn.to_q"),
    ],
)  # fmt: skip
def test_earlier_forms_of_diffusers(down: str, up: str, component: str, module: str, tmp_path: Path):
    lora = read_lora(saved(tmp_path / "x.safetensors", {down: DOWN, up: UP}))
    assert list(lora.components[component]) == [module]
    assert lora.components[component][module].scale == 1  # no alpha told: the rank


def test_a_convolution_in_three_factors(tmp_path: Path):
    """LyCORIS writes a 3x3 layer as 1x1, 3x3, 1x1; the change is that of the three one after another."""
    key, x = "lora_unet_down_blocks_0_resnets_0_conv1", torch.randn(1, 5, 6, 6, dtype=torch.float64)
    down, mid, up = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 1, 1), (2, 2, 3, 3), (4, 2, 1, 1)))
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    layer = read_lora(saved(tmp_path / "x.safetensors", state)).components["unet"]["down_blocks.0.resnets.0.conv1"]
    conv = torch.nn.functional.conv2d
    torch.testing.assert_close(conv(x, layer.delta()), conv(conv(conv(x, down), mid), up))


# --- numbers and metadata --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("kind", ["varied", "dora"])
def test_forms_into_one_another(format: str, kind: str, tmp_path: Path):
    """Bit for bit, also through a second form."""
    lora = lora_made.lora("sdxl", ".", varied=True, dora=kind == "dora")
    names = lora_made.module_names("sdxl")
    how = dict(base="sdxl", names=names)
    first = write_lora(tmp_path / "a.safetensors" if format != "peft" else tmp_path / "a", lora, format, **how)
    for other in ("diffusers", "kohya"):
        again = write_lora(tmp_path / f"{other}.safetensors", read_lora(first, names=names), other, **how)
        lora_made.same(read_lora(again, names=names), lora)


def test_alpha_to_the_last_digit(tmp_path: Path):
    """As rslora has it: 8 * sqrt(2) is no single-precision number."""
    lora = LoraFile({"unet": {Q: Layer(DOWN, UP, 8 * 2**0.5)}})
    for format in ("diffusers", "kohya"):
        file = write_lora(tmp_path / f"{format}.safetensors", lora, format, base="sd15", dtype="fp16")
        layer = read_lora(file).components["unet"][Q]
        assert layer.alpha == 8 * 2**0.5 and layer.down.dtype == layer.up.dtype == torch.float16
        assert torch.equal(layer.down, DOWN.half()) and layer.delta().dtype == torch.float32


def test_metadata(tmp_path: Path):
    """kohya's and modelspec's, with the hash as modelspec defines it: of all that follows the header."""
    lora = small(metadata={"ss_learning_rate": "1e-4", "modelspec.hash_sha256": "0xold"})
    how = dict(base="sd15", trigger=["sks dog", "toy"], resolution=(64, 48))
    file = write_lora(tmp_path / "toy.safetensors", lora, "kohya", **how)
    found, content = headers(file), file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content[start:]).hexdigest()
    for key, value in {
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "3.0", "ss_v2": "False",
        "ss_base_model_version": "sd_v1", "ss_learning_rate": "1e-4", "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation": "diffusers",
        "modelspec.title": "toy", "modelspec.resolution": "64x48", "modelspec.trigger_phrase": "sks dog, toy",
    }.items():  # fmt: skip
        assert found[key] == value
    assert list(next(iter(json.loads(found["ss_tag_frequency"]).values()))) == ["sks dog", "toy"]
    again = read_lora(file)
    assert family_of(again) == "sd15"  # by what it says: its layers are of no published size
    named = write_lora(tmp_path / "c.safetensors", again, title="Toys")
    assert headers(named)["modelspec.title"] == "Toys"
    other = write_lora(tmp_path / "b.safetensors", again)
    assert {k: v for k, v in headers(other).items() if k != "lora_adapter_metadata"} == found | {
        "modelspec.hash_sha256": headers(other)["modelspec.hash_sha256"]
    }


def test_sizes_of_ones_own_are_not_labelled_as_a_published_model(tmp_path: Path):
    file = write_lora(tmp_path / "a.safetensors", small(), base="sd", resolution=(64, 64))
    again = write_lora(tmp_path / "b.safetensors", read_lora(file), "kohya")  # SD's names are known
    for found in (headers(file), headers(again)):
        assert found["modelspec.architecture"] == "latent-t2i-sd/lora"
        assert found["modelspec.resolution"] == "64x64" and "ss_base_model_version" not in found


@pytest.mark.parametrize(("width", "family"), [(768, "sd15"), (1024, "sd21"), (2048, "sdxl")])
def test_family_by_the_width_of_the_text(width: int, family: str):
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert family_of(LoraFile({"unet": {key: Layer(torch.ones(1, width), torch.ones(4, 1), 1.0)}})) == family


def test_a_look_reads_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lora = lora_made.lora("sd15", varied=True, dora=True)
    file = write_lora(tmp_path / "x.safetensors", lora, "kohya", base="sd15")
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    offsets = json.loads(content[8:start])
    for key, entry in offsets.items():
        if key != "__metadata__" and not key.endswith(".alpha"):
            a, b = entry["data_offsets"]
            content[start + a : start + b] = b"\xff" * (b - a)  # NaN everywhere: nothing would be equal
    file.write_bytes(content)
    found, format = look_into(file)
    assert format == "kohya" and found.layers().keys() == lora.layers().keys()
    for name, layer in found.layers().items():
        known = lora.layers()[name]
        assert layer.down.is_meta and layer.shape == known.shape and layer.alpha == known.alpha


def test_folders(tmp_path: Path):
    """The output_dir of a run holds adapter/; a folder may hold one of either name."""
    run = tmp_path / "run"
    write_lora(run / "adapter", small())
    lora_made.same(read_lora(run), small())
    lora_made.same(read_lora(run / "adapter"), small())
    assert [x.name for x in (run / "adapter").iterdir()] == ["pytorch_lora_weights.safetensors"]


# --- bad input -------------------------------------------------------------------------------------------------------

A, B = f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight"
K = f"lora_unet_{Q.replace('.', '_')}"
UNKNOWN = "lora_unet_down_blocks_0_wings_0_to_q"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({f"{K}.hada_w1_a": DOWN}, f"{K}.hada_w1_a is of a LoHa, not of a LoRA"),
        ({f"{K}.lokr_w1": DOWN}, "is of a LoKr, not of a LoRA"),
        ({f"{K}.diff": DOWN}, "is of a full difference"),
        ({A: DOWN}, f"{A}: its layer has no up, only down"),
        ({A: DOWN[:0], B: UP[:, :0]}, "a LoRA of rank 0"),
        ({A: DOWN, B: torch.randn(4, 3)}, r"down (2, 6) and up (4, 3) do not go together"),
        ({A: DOWN, B: UP, f"unet.{Q}.lora_magnitude_vector": torch.ones(5)}, "is (5,): not one length for each of 4"),
        ({f"{K}.lora_down.weight": DOWN, f"{K}.lora_up.weight": UP, f"{K}.dora_scale": torch.ones(1, 4)},
         "a DoRA over the inputs has no stock form"),
        ({f"{UNKNOWN}.lora_down.weight": DOWN, f"{UNKNOWN}.lora_up.weight": UP},
         f"{UNKNOWN}: no module of stock unets"),
        ({A: DOWN, B: UP, "conv_in.weight": UP}, "no LoRA, or not one alone: conv_in.weight is none of its tensors"),
        ({"model.diffusion_model.out.2.weight": UP}, "no LoRA, or not one alone"),
        ({A: DOWN, B: UP, f"unet.{Q}.lora.down.weight": DOWN}, "are one tensor of one layer"),
        ({A: DOWN, B: UP, f"{K}.lora_down.weight": DOWN, f"{K}.lora_up.weight": UP}, f"are both unet.{Q}"),
        ({A: DOWN, B: UP, f"unet.{Q}.alpha": torch.ones(2)}, "is (2,), expected one number"),
        ({"x.lora_A.weight": DOWN, "x.lora_B.weight": UP}, "x: no component is named"),
        ({}, "no LoRA in it: the file holds no tensor"),
        ({A: DOWN, B: UP.clone().fill_(float("nan"))}, f"{B} holds NaN or Inf"),
        ({A: DOWN.half() * 1e6, B: UP.half()}, f"{A} holds NaN or Inf"),
        ({A: DOWN, B: UP, f"unet.{Q}.alpha": torch.tensor(float("inf"))}, "alpha holds NaN or Inf"),
    ],
)  # fmt: skip
def test_what_is_no_lora_is_refused(state: dict, said: str, tmp_path: Path):
    file = saved(tmp_path / "x.safetensors", state)
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{re.escape(said)}"):
        read_lora(file)


def test_files_that_are_none(tmp_path: Path):
    file = write_lora(tmp_path / "x.safetensors", small())
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-10])
    torch.save({A: DOWN}, tmp_path / "x.pt")
    torch.save({A: DOWN}, tmp_path / "y.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_model.bin").write_bytes(b"")
    for name, said in (
        ("none.safetensors", "no such file or folder"),
        ("cut.safetensors", "not a safetensors file, or cut short"),
        ("x.pt", "a pickle, which may run code and is not read; a LoRA is a .safetensors file"),
        ("y.safetensors", "a pickle"),
        ("folder", r"no LoRA in it .*; adapter_model\.bin is a pickle, which is not read"),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}: .*{said}"):
            read_lora(tmp_path / name)


def test_configs_that_do_not_fit(tmp_path: Path):
    for told, said in (
        ("{", "lora_adapter_metadata is not JSON"),
        (json.dumps({"unet.r": 4, "unet.lora_alpha": 4}), "of rank 2, but its config says 4"),
        (json.dumps({"unet.r": 2, "unet.lora_alpha": "much"}), "alpha 'much', expected a number"),
    ):
        file = saved(tmp_path / "x.safetensors", {A: DOWN, B: UP}, {"lora_adapter_metadata": told})
        with pytest.raises(ValueError, match=rf"x\.safetensors: .*{said}"):
            read_lora(file)
    folder = write_lora(tmp_path / "peft", small(), "peft")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LOKR"'))
    with pytest.raises(ValueError, match=r"adapter_config\.json: peft_type is 'LOKR'"):
        read_lora(folder)
    config.unlink()
    for place in (folder, folder / "adapter_model.safetensors"):  # its alpha would not be known
        with pytest.raises(ValueError, match=r"adapter_config\.json: missing"):
            read_lora(place)


def test_a_network_of_another_kind_names_the_key(tmp_path: Path):
    state = {f"{K}.lora_down.weight": DOWN, f"{K}.lora_up.weight": UP}
    file = saved(tmp_path / "x.safetensors", state)
    with pytest.raises(ValueError, match=f"{K}: no module of the network's list of modules"):
        read_lora(file, names={"unet": ["conv_in"]})
    with pytest.raises(ValueError, match=rf"{K}: could be .*"):
        read_lora(file, names={"unet": [Q, Q.replace("attn1.to", "attn1_to")]})


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("x", {"format": "kohya", "base": "sd15"}, "expected a name that ends in .safetensors"),
        ("x.safetensors", {"format": "kohya"}, "give its family"),
        ("x.safetensors", {"format": "kohya", "base": "sd3"}, "unet: a sd3 model has none"),
        ("x.safetensors", {"format": "peft"}, "peft's form is a folder"),
        ("x.safetensors", {"format": "a1111"}, "format 'a1111' is not one of diffusers, kohya, peft"),
        ("x.safetensors", {"base": "flux"}, "base 'flux' is not one of"),
        ("x.safetensors", {"dtype": "fp8"}, "dtype 'fp8' is not one of"),
        ("there.safetensors", {}, "is there already; --overwrite replaces it"),
        ("file", {}, "file: a file of this name is in the way of the folder"),
    ],
)
def test_what_is_not_written(target: str, options: dict, said: str, tmp_path: Path):
    there = write_lora(tmp_path / "there.safetensors", small())
    before = there.read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=re.escape(said)):
        write_lora(tmp_path / target, small(), **options)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "there.safetensors"] and there.read_bytes() == before


def test_writing_over_and_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Disk full: what was there stays, and nothing else is left."""
    file = write_lora(tmp_path / "x.safetensors", small())
    write_lora(file, LoraFile({"unet": {Q: Layer(DOWN, 2 * UP, 3.0)}}), overwrite=True)
    assert torch.equal(load_file(file)[B], 2 * UP)

    def full(path: Path, *args, **kw):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.lora.write.write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        write_lora(file, small(), overwrite=True)
    assert torch.equal(load_file(file)[B], 2 * UP) and len(list(tmp_path.iterdir())) == 1
    mixed = LoraFile({"unet": {Q: Layer(DOWN, UP, 1.0), "conv_out": Layer(DOWN, UP, 1.0, torch.ones(4))}})
    with pytest.raises(ValueError, match=r"unet: conv_out is a DoRA, .*to_q is not"):
        write_lora(tmp_path / "y.safetensors", mixed)
    with pytest.raises(ValueError, match=r"holds 1e\+06, beyond torch\.float16"):
        write_lora(tmp_path / "y.safetensors", LoraFile({"unet": {Q: Layer(DOWN, UP * 0 + 1e6, 1.0)}}), dtype="fp16")
