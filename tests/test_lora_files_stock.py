"""Every file that is written is taken by stock ``load_lora_weights`` (or peft), and gives the weights that it means."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from peft import PeftModel

from pipelines.lora.files import LoraFile, read_lora, write_lora
from tests import families, lora_made
from tests.lora_made import apart, changed, quiet, weights

CLOSE = 1e-5  # single precision: stock adds up @ down in float32


def loaded(family: str, file: Path, *components: str):
    """The stock pipeline with the file's LoRA fused into it."""
    pipe = copy.deepcopy(lora_made.stock(family))
    with quiet():
        pipe.load_lora_weights(str(file), adapter_name="a")
        pipe.fuse_lora(components=list(components))
        pipe.unload_lora_weights()
    return pipe


def check(family: str, file: Path, lora: LoraFile) -> None:
    pipe = loaded(family, file, *lora.components)
    for name, part in lora_made.parts(family).items():
        want = changed(weights(part), lora.components.get(name, {}))
        assert apart(weights(getattr(pipe, name)), want) < CLOSE, name
        if name in lora.components:
            assert apart(weights(part), want) > 1e-2, name  # it does change something


@pytest.mark.parametrize("kind", ["alpha", "varied", "dora"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_diffusers_form(family: str, kind: str, tmp_path: Path):
    """Every linear and convolution layer; of SDXL, which has many, each kind."""
    pattern = (
        r"(to_q|to_out\.0|proj_in|proj_out|conv1|time_emb_proj)$" if family == "sdxl" and kind != "varied" else "."
    )
    lora = lora_made.lora(family, pattern, varied=kind == "varied", dora=kind == "dora")
    file = write_lora(tmp_path, lora)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    check(family, file, lora)
    lora_made.same(read_lora(file), lora)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kohya_form(family: str, tmp_path: Path):
    lora = lora_made.lora(family, ".")
    names = lora_made.module_names(family)
    file = write_lora(tmp_path / "x.safetensors", lora, "kohya", base=family, names=names)
    check(family, file, lora)
    lora_made.same(read_lora(file, names=names), lora)


def test_what_stock_misreads_in_kohya_form_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Several alphas: stock takes the most common one for all attention layers. With one alpha it is right."""
    from pipelines.lora.tools import convert

    lora = lora_made.lora("sd15", varied=True)
    with caplog.at_level(logging.WARNING):
        file = write_lora(tmp_path / "x.safetensors", lora, "kohya", base="sd15")
    assert "several alphas" in caplog.text
    lora_made.same(read_lora(file), lora)
    with pytest.warns(RuntimeWarning, match="alpha_pattern"):
        pipe = loaded("sd15", file, "unet")
    unet = lora_made.parts("sd15")["unet"]
    assert apart(weights(pipe.unet), changed(weights(unet), lora.components["unet"])) > 1e-2  # else the note is old
    check("sd15", convert(lora, tmp_path / "y.safetensors", "kohya", base="sd15", same_alpha=True), lora)
    caplog.clear()
    write_lora(tmp_path / "dora.safetensors", lora_made.lora("sd15", dora=True), "kohya", base="sd15")
    write_lora(tmp_path / "sd3.safetensors", lora_made.lora("sd3", "to_q$"), "kohya")
    assert "stock diffusers leaves dora_scale out" in caplog.text and "finds nothing in it" in caplog.text


def test_a_text_encoder_without_attention_layers(tmp_path: Path):
    """Stock cannot tell today's form of such a file, and reads the older one."""
    text = lora_made.parts("sd15")["text_encoder"]
    lora = LoraFile({"text_encoder": lora_made.layers(text, "fc1$")})
    check("sd15", write_lora(tmp_path, lora), lora)
    lora_made.same(read_lora(tmp_path), lora)


def test_the_same_picture(tmp_path: Path):
    """Not fused, with a weight, as people use it."""
    lora = lora_made.lora("sd15")
    write_lora(tmp_path / "a", lora)
    write_lora(tmp_path / "b.safetensors", lora, "kohya", base="sd15")
    pictures = []
    for file in (tmp_path / "a", tmp_path / "b.safetensors", None):
        pipe = families.quiet(copy.deepcopy(lora_made.stock("sd15")))
        if file is not None:
            with quiet():
                pipe.load_lora_weights(str(file), adapter_name="a")
                pipe.set_adapters("a", 0.7)
        else:
            for name, part in lora.components.items():
                module = getattr(pipe, name)
                new = changed(weights(module), part, 0.7)
                module.load_state_dict({n: new[n.removeprefix("text_model.")] for n, _ in module.named_parameters()})
        made = pipe("a red apple", num_inference_steps=3, output_type="pt", latents=families.waves(1, 4, 8, 8))
        pictures.append(made.images)
    for picture in pictures[:2]:
        assert (picture - pictures[2]).abs().max() < 1e-4
    plain = lora_made.stock("sd15")(
        "a red apple", num_inference_steps=3, output_type="pt", latents=families.waves(1, 4, 8, 8)
    )
    assert (plain.images - pictures[2]).abs().max() > 1e-2


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_peft_form(component: str, dora: bool, tmp_path: Path):
    module = lora_made.parts("sdxl")[component]
    lora = LoraFile({component: lora_made.layers(module, ".", varied=True, dora=dora)})
    folder = write_lora(tmp_path, lora, "peft", base="sdxl")
    lora_made.same(read_lora(folder), lora)
    place = folder / component if component == "text_encoder_2" else folder
    merged = PeftModel.from_pretrained(copy.deepcopy(module), str(place)).merge_and_unload()
    assert apart(weights(merged), changed(weights(module), lora.components[component])) < CLOSE


def test_peft_form_of_a_pixart(tmp_path: Path):
    """Its stock pipelines have no loader; peft has."""
    module = families.pixart(PixArtAlphaPipeline).transformer
    lora = LoraFile({"transformer": lora_made.layers(module, ".", varied=True)})
    assert write_lora(tmp_path / "a", lora, "peft") == tmp_path / "a"
    merged = PeftModel.from_pretrained(copy.deepcopy(module), str(tmp_path / "a")).merge_and_unload()
    assert apart(weights(merged), changed(weights(module), lora.components["transformer"])) < CLOSE
    lora_made.same(read_lora(tmp_path / "a"), lora)
    with pytest.raises(ValueError, match="PixArt has no form of kohya's"):
        write_lora(tmp_path / "x.safetensors", lora, "kohya")


def test_what_peft_itself_writes_is_read(tmp_path: Path):
    """With rslora, patterns and an adapter's name, for one component and through stock's own saving."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    unet = copy.deepcopy(lora_made.parts("sd15")["unet"])
    how = dict(
        r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, target_modules=["to_q", "conv1"],
        rank_pattern={"mid_block.resnets.0.conv1": 2, "attn2.to_q": 3}, alpha_pattern={"^down_blocks.*to_q": 9},
    )  # fmt: skip
    model = get_peft_model(unet, LoraConfig(**how))
    model.save_pretrained(tmp_path / "peft")
    before = weights(lora_made.parts("sd15")["unet"])
    want = weights(copy.deepcopy(model).merge_and_unload())
    state = {f"{n.removeprefix('base_model.model.')}": x for n, x in get_peft_model_state_dict(model).items()}
    unet.peft_config = model.peft_config
    told = _collate_lora_metadata({"unet": unet})
    StableDiffusionPipeline.save_lora_weights(tmp_path / "stock", unet_lora_layers=state, **told)
    for name in ("peft", "stock"):
        lora = read_lora(tmp_path / name)
        assert {layer.rank for layer in lora.layers().values()} == {2, 3, 4}
        assert apart(changed(before, lora.components["unet"]), want) < CLOSE
    assert torch.is_tensor(want["conv_in.weight"])
