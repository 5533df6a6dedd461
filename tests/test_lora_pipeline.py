"""LoRA files in our pipeline and in stock diffusers': the same pictures, whatever is done with them."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, inject_adapter_in_model

from ldm.models.new_tokens import add_tokens
from pipelines.lora.files import LoraFile, read_lora, write_lora
from pipelines.lora.live import LoraSettings, add_lora, lora_of, unload
from pipelines.text_to_image import TextToImagePipeline
from pipelines.textual_inversion import save_embeddings
from tests import families
from tests.families import quiet

CALL = dict(prompt=["a red apple", "a zebra"], num_inference_steps=2, guidance_scale=3.0, output_type="latent")
FAMILIES = [("sd", True), ("sdxl", False), ("sd3 without t5", False)]


def pair(family: str):
    """The stock pipeline and ours, with equal weights of their own."""
    return quiet(families.PIPELINES[family]()), ours(family)


def ours(family: str) -> TextToImagePipeline:
    return quiet(TextToImagePipeline.from_diffusers(families.PIPELINES[family]()))


def draw(pipe) -> torch.Tensor:
    return pipe(**CALL, generator=torch.Generator().manual_seed(5)).images


def made(pipe: TextToImagePipeline, seed: int, dora: bool = False, rank: int = 2, targets="conv", only=()) -> LoraFile:
    """A LoRA of every network, with alpha 3."""
    generator, components = torch.Generator().manual_seed(seed), {}
    for part, module in pipe._loadable.items():
        if only and part not in only:
            continue
        add_lora(module, LoraSettings(rank=rank, alpha=3.0, dora=dora, targets=targets))
        components[part] = {
            name: replace(
                layer,
                up=0.3 * torch.randn(layer.up.shape, generator=generator),
                magnitude=layer.magnitude
                if layer.magnitude is None
                else layer.magnitude * (1 + 0.2 * torch.randn(layer.magnitude.shape, generator=generator)),
            )
            for name, layer in lora_of(module).items()
        }
        unload(module)
    return LoraFile(components)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() < 1e-4 * max(1.0, b.abs().max().item() / 10)


@pytest.fixture(autouse=True)
def _quiet_stock():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("family", "dora"), FAMILIES)
def test_all_that_stock_does_gives_the_same_pictures(family, dora, tmp_path):
    stock, mine = pair(family)
    plain = draw(mine)
    a = write_lora(tmp_path / "a", made(mine, 1, dora))
    b = write_lora(tmp_path / "b", made(mine, 2, dora, rank=4, targets="attention"))
    seen = [plain]

    def same() -> None:
        picture = draw(mine)
        assert_same(draw(stock), picture)
        assert all((picture - other).abs().max() > 1e-2 for other in seen)  # each setting is one of its own
        seen.append(picture)

    assert stock.load_lora_weights(a, adapter_name="a") is None and mine.load_lora_weights(a, "a") == "a"
    assert mine.get_list_adapters() == stock.get_list_adapters()
    same()
    for pipe in (stock, mine):
        pipe.load_lora_weights(b)
    assert mine.get_active_adapters() == ["default_0"]
    same()
    names = ["a", stock.get_active_adapters()[0]]
    stock.set_adapters(names, [0.7, -0.4])
    mine.set_adapters(["a", "default_0"], [0.7, -0.4])
    same()
    before = draw(mine)
    stock.fuse_lora(components=list(mine.get_list_adapters()), lora_scale=0.8)
    mine.fuse_lora(lora_scale=0.8)
    same()
    mine.unfuse_lora()
    assert torch.equal(draw(mine), before)
    mine.disable_lora()
    assert torch.equal(draw(mine), plain)
    mine.set_adapters(["a", "default_0"], [0.7, -0.4])
    mine.fuse_lora(lora_scale=0.8)
    for pipe in (stock, mine):
        pipe.unload_lora_weights()
    assert mine.get_list_adapters() == {} and torch.equal(draw(mine), seen[-1])
    assert_same(draw(stock), seen[-1])


def test_pixart_as_peft_loads_it(tmp_path):
    stock, mine = pair("pixart alpha")
    plain = draw(mine)
    folder = write_lora(tmp_path / "adapter", made(mine, 1, only=("transformer",)), "peft")
    assert (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()
    stock.transformer = PeftModel.from_pretrained(stock.transformer, str(folder))
    mine.load_lora_weights(folder)
    picture = draw(mine)
    sized = CALL | {"use_resolution_binning": False, "generator": torch.Generator().manual_seed(5)}
    assert_same(stock(**sized).images, picture)
    assert (picture - plain).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize(("family", "dora"), [("sd", True), ("sdxl", False)])
def test_what_is_written_is_what_acts(family, dora, form, tmp_path):
    mine = ours(family)
    plain = draw(mine)
    mine.load_lora_weights(made(mine, 1, dora), "a")
    picture = draw(mine)
    file = mine.save_lora_weights(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors", format=form)
    assert {
        layer.alpha for part in read_lora(file, names=mine._names()).components.values() for layer in part.values()
    } == {3.0}
    mine.unload_lora_weights()
    assert torch.equal(draw(mine), plain)
    mine.load_lora_weights(tmp_path / "run")  # the output_dir of a run
    assert torch.equal(draw(mine), picture)
    with pytest.raises(ValueError, match="no adapter 'b' in the pipeline; there is default_0"):
        mine.save_lora_weights(tmp_path / "b", "b")
    mine.load_lora_weights(file, "b")
    with pytest.raises(ValueError, match="say which LoRA to write; there is default_0, b"):
        mine.save_lora_weights(tmp_path / "b")


def test_a_folder_is_saved_with_what_is_fused_and_never_without(tmp_path):
    mine = ours("sd")
    plain, words = draw(mine), mine.text.model
    mine.load_lora_weights(made(mine, 1))
    picture = draw(mine)
    with pytest.raises(ValueError, match=r"save_pretrained: unet: a LoRA acts in it \(default_0\)"):
        mine.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    assert torch.equal(draw(mine), picture)
    mine.fuse_lora()
    mine.save_pretrained(tmp_path / "pipeline")
    assert_same(draw(quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipeline"))), picture)
    mine.unfuse_lora()
    assert torch.equal(draw(mine), picture) and mine.text.model is words
    mine.disable_lora()
    mine.save_pretrained(tmp_path / "pipeline")
    mine.unload_lora_weights()
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), mine.net)  # one that came past our methods
    with pytest.raises(ValueError, match=r"save_pretrained: unet: a LoRA acts in it \(default\)"):
        mine.save_pretrained(tmp_path / "pipeline")
    assert_same(draw(quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipeline"))), plain)


def test_a_lora_for_another_model_changes_nothing(tmp_path):
    mine, other = ours("sd"), ours("sd3 without t5")
    plain, file = draw(mine), made(mine, 1)
    wrong: dict[str, LoraFile] = {
        "It changes transformer; this one has unet, text_encoder": made(other, 1, only=("transformer",)),
        "holds no layer": LoraFile({}),
    }
    text = {f"{name}x": layer for name, layer in file.components["text_encoder"].items()}
    wrong["text_encoder: a LoRA for another model.* 18 of its 18 layers"] = LoraFile(
        {**file.components, "text_encoder": text}
    )
    one = dict(list(file.components["unet"].items())[:1])
    wrong["unet: a LoRA for another model.* 1 of its 2 layers are not in this UNet: mid_block.attn.q"] = LoraFile(
        {"unet": one | {"mid_block.attn.q": next(iter(one.values()))}}
    )
    narrow = {name: replace(layer, down=torch.ones(2, 40)) for name, layer in file.components["text_encoder"].items()}
    wrong[r"text_encoder: .*it changes \(16, 40\), this CLIPTextModel has \(16, 16\)"] = LoraFile(
        {"unet": one, "text_encoder": narrow}
    )
    for message, lora in wrong.items():
        with pytest.raises(ValueError, match=message):
            mine.load_lora_weights(lora)
        assert mine.get_list_adapters() == {}
    assert torch.equal(draw(mine), plain)
    file_of_another = write_lora(tmp_path / "sd3", wrong["It changes transformer; this one has unet, text_encoder"])
    with pytest.raises(ValueError, match=r"sd3.*pytorch_lora_weights.*It changes transformer"):
        mine.load_lora_weights(file_of_another)
    mine.load_lora_weights(file, "a")
    with pytest.raises(ValueError, match="adapter name 'a' is taken"):
        mine.load_lora_weights(file, "a")
    with pytest.raises(ValueError, match="no adapter 'b'; there is a"):
        mine.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="adapter_weights: 2 for 1 adapters"):
        mine.set_adapters("a", [1.0, 2.0])
    with pytest.raises(ValueError, match="one number for each adapter"):
        mine.set_adapters("a", {"unet": 1.0})  # type: ignore[arg-type]


def test_learned_words(tmp_path: Path):
    stock, mine = pair("sd")
    teacher = ours("sd")
    add_tokens(teacher.text, [("<toy>", "apple", 2)])
    with torch.no_grad():
        for rows in (p for p in teacher.text.parameters() if p.requires_grad):
            rows.add_(0.3)
    (file,) = save_embeddings(tmp_path / "learned_embeds.safetensors", teacher.text)
    call = CALL | {"prompt": ["a red <toy>", "<toy> face"]}
    mine.load_textual_inversion(file)
    stock.load_textual_inversion(str(file))
    pictures = [pipe(**call, generator=torch.Generator().manual_seed(5)).images for pipe in (stock, mine)]
    assert_same(*pictures)
    with pytest.raises(ValueError, match="<toy>"):
        mine.load_textual_inversion(file)
