"""Whole stock pipelines of every family: taken over, drawn with, written back and opened by stock again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PNDMScheduler,
)

from pipelines.core import generate
from pipelines.folder import load_parts, save_parts
from pipelines.stock import from_stock_pipeline, to_stock_pipeline
from pipelines.text_to_image import TextToImagePipeline
from tests import families
from tests.families import BETAS, PIPELINES, quiet, waves

PROMPTS, NEGATIVE = ["a red apple", "Grinning face and a zebra " * 30], ["green", ""]
SIZE = dict(height=16, width=24)  # latents of 8 x 12
# Of the largest number, which is 4 to 550 here (nothing is trained): float32 over 20 steps of two implementations,
# which sum in another order; measured 3e-7 to 2e-6.
CLOSE = 3e-5  # of pictures in [0, 1]: convolutions sum in another order than stock's


def stock_call(pipe: Any, *args: Any, **kw: Any) -> Any:
    """PixArt would draw at the nearest of its own sizes, which a tiny one has not."""
    kw |= {"use_resolution_binning": False} if type(pipe).__name__.startswith("PixArt") else {}
    return pipe(*args, **kw).images


def apart(ours: Any, stock: Any) -> float:
    ours, stock = np.asarray(ours), np.asarray(stock)
    return float(np.abs(ours - stock).max() / max(1.0, np.abs(stock).max()))


@pytest.fixture(scope="module")
def stocks() -> dict[str, Any]:
    return {name: quiet(make()) for name, make in PIPELINES.items()}


@pytest.fixture(scope="module")
def saved(stocks, tmp_path_factory) -> dict[str, Any]:
    """The folder that stock writes of each, and the one that ours writes of what it has read there."""
    made = {}
    for name in ("sdxl", "sdxl second alone", "sdxl no zeros", "sd3", "sd3 without t5", "pixart alpha", "pixart sigma"):
        place = tmp_path_factory.mktemp(name.replace(" ", "_"))
        stocks[name].save_pretrained(place / "stock")
        made[name] = place / "stock", save_parts(place / "ours", load_parts(place / "stock"))
    return made


def check(pipe: Any, ours: Any, **kw: Any) -> None:
    call = dict(num_inference_steps=20, guidance_scale=4.0, output_type="latent", latents=waves(2, 4, 8, 12)) | kw
    expected = stock_call(pipe, PROMPTS, **SIZE, **call)
    drawn = ours(PROMPTS, **SIZE, **call).images
    assert drawn.std() > 0.05
    assert apart(drawn, expected) < CLOSE


@pytest.mark.parametrize("name", PIPELINES)
def test_a_stock_pipeline_is_taken_over(stocks, name):
    """Not square, with and without a negative prompt, guided and not; the weights are shared."""
    pipe = stocks[name]
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    net = getattr(pipe, "unet", getattr(pipe, "transformer", None))
    assert {p.data_ptr() for p in ours.net.parameters()} == {p.data_ptr() for p in net.parameters()}
    encoders = [part for key, part in pipe.components.items() if key.startswith("text_encoder") and part is not None]
    assert {p.data_ptr() for p in ours.text.parameters()} == {p.data_ptr() for m in encoders for p in m.parameters()}
    check(pipe, ours, negative_prompt=NEGATIVE)
    check(pipe, ours, num_inference_steps=5)
    check(pipe, ours, guidance_scale=1.0, num_inference_steps=3)


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_and_generators(stocks, name):
    pipe, call = stocks[name], dict(num_inference_steps=2, num_images_per_prompt=2, output_type="np")
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    pictures = [
        draw(PROMPTS, generator=[torch.Generator().manual_seed(i) for i in range(4)], **SIZE, **call)
        for draw in (lambda *a, **k: ours(*a, **k).images, lambda *a, **k: stock_call(pipe, *a, **k))
    ]
    assert pictures[0].shape == (4, 16, 24, 3) and pictures[0].std() > 0.01
    assert apart(*pictures) < CLOSE


@pytest.mark.parametrize(("name", "steps", "scale"), [("sdxl", 50, 5.0), ("sd3", 28, 7.0), ("pixart alpha", 20, 4.5)])
def test_defaults_are_the_stock_pipelines(stocks, name, steps, scale):
    ours = quiet(TextToImagePipeline.from_diffusers(stocks[name]))
    noise = waves(1, 4, 8, 8)
    drawn = ours("a dog", latents=noise, output_type="latent").images
    assert (ours.num_timesteps, ours.guidance_scale) == (steps, scale)
    assert apart(drawn, stock_call(stocks[name], "a dog", latents=noise, output_type="latent")) < CLOSE


# --- SDXL --------------------------------------------------------------------------------------------------------


def test_sdxl_is_told_sizes(stocks):
    pipe = stocks["sdxl"]
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    call = dict(num_inference_steps=4, latents=waves(2, 4, 8, 12), output_type="latent", **SIZE)
    plain = ours(PROMPTS, **call).images
    for sizes in (
        dict(original_size=(512, 384), crops_coords_top_left=(3, 40), target_size=(100, 90)),
        dict(target_size=(9, 9)),
        dict(negative_original_size=(5, 7)),  # without its target size it says nothing
    ):
        check(pipe, ours, num_inference_steps=4, **sizes)
        told = apart(ours(PROMPTS, **call, **sizes).images, plain)
        assert told == 0 if "negative_original_size" in sizes else told > 10 * CLOSE


def test_sdxl_is_told_other_sizes_to_lead_away_from(stocks):
    """One by one: in a batch, stock hands the two rows of sizes out in turns, and so half of them to the wrong rows."""
    pipe = stocks["sdxl"]
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    call = dict(num_inference_steps=4, guidance_scale=4.0, output_type="latent", **SIZE)
    call |= dict(negative_original_size=(5, 7), negative_crops_coords_top_left=(2, 1), negative_target_size=(64, 32))
    noise = waves(2, 4, 8, 12)
    both = ours(PROMPTS, latents=noise, **call).images
    for i, prompt in enumerate(PROMPTS):
        one = pipe(prompt, latents=noise[i : i + 1], **call).images[0]
        assert apart(both[i], one) < CLOSE
    assert apart(pipe(PROMPTS, latents=noise, **call).images, both) > 50 * CLOSE


def test_sdxl_with_texts_for_either_encoder_and_with_embeddings(stocks):
    pipe = stocks["sdxl"]
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    check(pipe, ours, num_inference_steps=3, prompt_2=["a cat", "hot dog"], negative_prompt_2=["red", "blue"])
    check(pipe, ours, num_inference_steps=3, prompt_2=["a cat", "hot dog"], negative_prompt=NEGATIVE)
    tokens, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, device="cpu", negative_prompt=NEGATIVE)
    given = dict(prompt_embeds=tokens, pooled_prompt_embeds=pooled)
    away = dict(negative_prompt_embeds=null, negative_pooled_prompt_embeds=null_pooled)
    call = dict(num_inference_steps=3, latents=waves(2, 4, 8, 12), output_type="latent", **SIZE)
    for kw in (given, given | away):
        assert apart(ours(**kw, **call).images, pipe(**kw, **call).images) < CLOSE
    with pytest.raises(ValueError, match="pooled_prompt_embeds: needed with prompt_embeds"):
        ours(prompt_embeds=tokens, **call)


def test_sdxl_decodes_in_float32_where_half_would_overflow():
    pipe = families.sdxl()
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(1e5)  # its activations are above 65504
    pipe = quiet(pipe.to(torch.float16))
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    call = dict(num_inference_steps=2, latents=waves(1, 4, 8, 8).half(), output_type="np")
    drawn, expected = ours("zebra", **call).images, pipe("zebra", **call).images
    assert np.isfinite(drawn).all() and drawn.std() > 0.01
    assert np.abs(drawn - expected).mean() < 0.01  # half precision in the two loops
    assert ours.vae.dtype == torch.float16


# --- SD3, PixArt -------------------------------------------------------------------------------------------------


def test_sd3_with_embeddings_and_more_tokens(stocks):
    pipe = stocks["sd3"]
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    check(
        pipe, ours, num_inference_steps=3, max_sequence_length=40, prompt_3=["a cat", "b"], negative_prompt_3=["x", ""]
    )
    tokens, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, None, None, device="cpu")
    given = dict(prompt_embeds=tokens, pooled_prompt_embeds=pooled)
    given |= dict(negative_prompt_embeds=null, negative_pooled_prompt_embeds=null_pooled)
    call = dict(num_inference_steps=3, latents=waves(2, 4, 8, 12), output_type="latent", **SIZE)
    assert apart(ours(**given, **call).images, pipe(**given, **call).images) < CLOSE


def test_sd3_without_t5_has_one_token_for_stocks_256(stocks):
    text = from_stock_pipeline(stocks["sd3 without t5"]).text
    assert text.encode(["zebra"]).tokens.shape[1] == families.LENGTH + 1


def test_pixart_with_embeddings(stocks):
    pipe = stocks["pixart alpha"]
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    tokens, mask, null, null_mask = pipe.encode_prompt(PROMPTS)
    given = dict(prompt_embeds=tokens, prompt_attention_mask=mask)
    given |= dict(negative_prompt_embeds=null, negative_prompt_attention_mask=null_mask)
    call = dict(num_inference_steps=3, latents=waves(2, 4, 8, 12), output_type="latent", **SIZE)
    expected = stock_call(pipe, negative_prompt=None, **given, **call)
    assert apart(ours(**given, **call).images, expected) < CLOSE


def test_pixart_of_1024_pixels_is_told_its_size():
    """At a sample size of 128, with positions interpolated; drawn small."""
    pipe = quiet(families.pixart(sample_size=128, use_additional_conditions=None))
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    assert ours.net.sized
    check(pipe, ours, num_inference_steps=4)
    with pytest.raises(ValueError, match="PixArtAlphaPipeline alone"):
        from_stock_pipeline(families.pixart(PixArtSigmaPipeline, sample_size=128, use_additional_conditions=None))


def test_pixart_without_learned_variance():
    pipe = quiet(families.pixart(out_channels=4))
    check(pipe, quiet(TextToImagePipeline.from_diffusers(pipe)), num_inference_steps=4)


def test_pixart_cleans_captions_where_it_can(monkeypatch, stocks):
    """With bs4 and ftfy by stock's own code; here two that do nothing stand for them."""
    import diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha as module

    import pipelines.call as ours_module

    text = "A RED apple, see http://www.example.com/a.png #12345 &amp &quot; worldwide shipping"
    pipe = stocks["pixart alpha"]
    ours = quiet(TextToImagePipeline.from_diffusers(pipe))
    call = dict(num_inference_steps=2, latents=waves(1, 4, 8, 8), output_type="latent")
    without = ours(text, **call).images
    assert apart(without, stock_call(pipe, text, **call)) < CLOSE
    for where in (module, ours_module):
        monkeypatch.setattr(where, "is_bs4_available", lambda: True)
        monkeypatch.setattr(where, "is_ftfy_available", lambda: True)
    soup = type("Soup", (), {"__init__": lambda self, text, features: setattr(self, "text", text)})
    monkeypatch.setattr(module, "BeautifulSoup", soup, raising=False)
    monkeypatch.setattr(module, "ftfy", type("Ftfy", (), {"fix_text": staticmethod(str)}), raising=False)
    cleaned = ours(text, **call).images
    assert apart(cleaned, stock_call(pipe, text, **call)) < CLOSE
    assert apart(cleaned, without) > 1e-4
    assert apart(ours(text, clean_caption=False, **call).images, without) == 0


# --- schedulers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sdxl", "pixart alpha"])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
        PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_schedulers_in_either_pipeline(stocks, family, scheduler):
    pipe = stocks[family]
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        check(pipe, quiet(TextToImagePipeline.from_diffusers(pipe)), num_inference_steps=8)
    finally:
        pipe.scheduler = before


# --- folders -----------------------------------------------------------------------------------------------------

WRITTEN = ["sdxl", "sdxl second alone", "sdxl no zeros", "sd3", "sd3 without t5", "pixart alpha", "pixart sigma"]


@pytest.mark.parametrize("name", WRITTEN)
def test_written_back_it_is_the_same_stock_pipeline(stocks, saved, name):
    _, folder = saved[name]
    again = quiet(DiffusionPipeline.from_pretrained(folder, local_files_only=True))
    pipe = stocks[name]
    assert type(again) is type(pipe)
    call = dict(num_inference_steps=4, latents=waves(2, 4, 8, 12), output_type="np", **SIZE)
    expected = stock_call(pipe, PROMPTS, **call)
    assert apart(stock_call(again, PROMPTS, **call), expected) < 1e-6  # the T5 of zeros is a sum more
    assert apart(quiet(TextToImagePipeline.from_pretrained(folder))(PROMPTS, **call).images, expected) < CLOSE
    for part in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2"):
        before, after = getattr(pipe, part, None), getattr(again, part, None)
        assert (before is None) == (after is None)
        state = {} if before is None or after is None else after.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in (before.state_dict() if before else {}).items())


@pytest.mark.parametrize("name", WRITTEN)
def test_the_second_export_is_the_first(saved, name, tmp_path):
    _, folder = saved[name]
    again = save_parts(tmp_path / "again", load_parts(folder))
    files = [{str(f.relative_to(x)): f.read_bytes() for f in x.rglob("*") if f.is_file()} for x in (folder, again)]
    assert files[0] == files[1]


def test_the_index_names_the_t5_tokenizer_so_that_older_readers_find_its_file(saved):
    for name, part in (("sd3", "tokenizer_3"), ("pixart alpha", "tokenizer")):
        index = json.loads((saved[name][1] / "model_index.json").read_text())
        assert index[part] == ["transformers", "T5TokenizerFast"]


def test_no_t5_can_be_asked_for(saved, stocks):
    ours = quiet(TextToImagePipeline.from_pretrained(saved["sd3"][0], t5=None))
    assert ours.text.model_3 is None
    check(stocks["sd3 without t5"], ours, num_inference_steps=3)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart sigma"])
def test_shards_and_a_variant(stocks, name, tmp_path):
    stocks[name].save_pretrained(tmp_path / "a", variant="fp16", max_shard_size="40KB")
    assert list((tmp_path / "a").glob("*/diffusion_pytorch_model*-of-*.safetensors"))
    parts, expected = load_parts(tmp_path / "a", variant="fp16"), from_stock_pipeline(stocks[name])
    for part in ("net", "vae", "text"):
        state = getattr(parts, part).state_dict()
        assert all(torch.equal(state[key], value) for key, value in getattr(expected, part).state_dict().items())
    with pytest.raises(ValueError, match="variant='fp16'"):
        load_parts(tmp_path / "a")
    with pytest.raises(ValueError, match="no part has weights of variant 'bf16'"):
        load_parts(tmp_path / "a", variant="bf16")


def test_a_variant_of_some_parts_only(stocks, tmp_path):
    stocks["sdxl"].save_pretrained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "unet")
    stocks["sdxl"].unet.save_pretrained(tmp_path / "a" / "unet", variant="fp16")
    assert load_parts(tmp_path / "a", variant="fp16").text.family == "sdxl"


def index(**values: Any) -> Any:
    def change(folder):
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("sdxl", index(text_encoder_2=[None, None]), r"text_encoder_2 is \[None, None\], expected .*WithProjection"),
        ("sdxl", index(text_encoder=["transformers", "T5EncoderModel"]), "text_encoder is .*T5EncoderModel.*CLIPTextM"),
        ("sdxl", lambda f: shutil.rmtree(f / "text_encoder_2"), r"text_encoder_2/config\.json: missing"),
        ("sdxl", lambda f: shutil.rmtree(f / "tokenizer_2"), r"tokenizer_2: no tokenizer here"),
        ("sd3", lambda f: shutil.rmtree(f / "tokenizer_3"), r"tokenizer_3: no tokenizer here.*spiece\.model"),
        ("sd3", lambda f: (f / "text_encoder_3/model.safetensors").unlink(), "text_encoder_3: no safetensors file"),
        ("sd3", index(transformer=["diffusers", "FluxTransformer2DModel"]), "transformer is .*Flux.*SD3Transformer2D"),
        ("pixart alpha", index(text_encoder=None), r"text_encoder is None, expected .*T5EncoderModel"),
        ("pixart alpha", index(_class_name="PixArtPipeline"), "PixArtAlphaPipeline, PixArtSigmaPipeline can be opened"),
        ("pixart alpha", index(_class_name="StableDiffusion3Pipeline"), "transformer is .*PixArt.*expected.*SD3"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(saved, tmp_path, name, damage, message):
    folder = shutil.copytree(saved[name][0], tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_parts(folder)


def test_a_pipeline_without_a_part_is_refused():
    pipe = families.sdxl()
    pipe.unet = None
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline: its unet is None"):
        from_stock_pipeline(pipe)
    pipe = families.sd3()
    pipe.tokenizer_2 = None
    with pytest.raises(ValueError, match="text_encoder_2, and no tokenizer_2"):
        from_stock_pipeline(pipe)


def test_parts_of_other_families_are_refused(stocks):
    parts = {
        name: from_stock_pipeline(stocks[name]) for name in ("sd", "sdxl", "sdxl second alone", "sd3", "pixart alpha")
    }
    second, alpha = parts["sdxl second alone"], parts["pixart alpha"]
    for wrong, message in (
        (replace(parts["sdxl"], text=parts["sd"].text), "UNet takes text family 'sdxl', the text encoder is 'sd'"),
        (replace(parts["sdxl"], text=second.text), "cross_attention_dim is 40, the text encoder's width is 24"),
        (replace(alpha, text=parts["sd3"].text), "DiT takes text family 'pixart'"),
        (replace(parts["sd3"], text=parts["sdxl"].text), "MMDiT takes text family 'sd3'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_stock_pipeline(wrong)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart alpha"])
def test_core_draws_what_the_pipeline_draws(stocks, name):
    """The grids that training shows are made by the body that users call, sizes told and all."""
    ours = quiet(TextToImagePipeline.from_diffusers(stocks[name]))
    call = dict(height=16, width=24, guidance_scale=3.0)
    drawn = [
        ours(
            PROMPTS, num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="pt", **call
        ).images,
        generate(ours.parts, PROMPTS, steps=3, generator=torch.Generator().manual_seed(1), **call),
    ]
    assert torch.allclose(*drawn, atol=1e-6)


def test_a_pixart_with_text_longer_than_sigmas_has_no_stock_form():
    parts = from_stock_pipeline(families.pixart(PixArtAlphaPipeline))
    parts.text.max_sequence_length = 301
    with pytest.raises(ValueError, match="301 tokens; PixArt's pipelines read 120 or 300"):
        to_stock_pipeline(parts)
