"""Our pipeline against stock ones: the same folder, the same noise, the same picture, without this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.paths import VE, CosineVP, DiscreteVP, RectifiedFlow
from ldm.prediction import Flow, Karras, V
from ldm.sampling import SAMPLERS
from pipelines.core import Parts, generate, start_latents
from pipelines.folder import export, load_parts, save_parts
from pipelines.schedulers import default_schedule
from pipelines.text_to_image import TextToImagePipeline
from tests import tiny

FORMS = ["unet", "mmdit", "unet_v", "unet_edm"]
PROMPTS, NEGATIVE = ["a red apple", "grinning face", "a zebra in a fire engine and much more than fits"], "green"
CALL = dict(num_inference_steps=20, guidance_scale=3.0)
PICTURE = (4, 8, 8)  # latents of one picture

# The other environment: a fresh interpreter far from here, in which any import of ours fails.
STOCK_SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ldm", "pipelines", "training"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

for folder in sys.argv[1:]:
    noise = load_file(folder + "/../noise.safetensors")["noise"]
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompts = %r
    call = dict(negative_prompt=[%r] * len(prompts), num_inference_steps=20, guidance_scale=3.0)
    latents = pipe(prompts, latents=noise.clone(), output_type="latent", **call).images
    pictures = torch.from_numpy(pipe(prompts, latents=noise.clone(), output_type="np", **call).images)
    save_file({"latents": latents, "pictures": pictures.contiguous()}, folder + "/../stock.safetensors")
    print(type(pipe).__name__)
assert not {"ldm", "pipelines", "training"} & set(sys.modules)
"""


def parts(form: str, **kw) -> Parts:
    family = "sd3" if form == "mmdit" else "sd"
    path, prediction = RectifiedFlow(), Flow()
    if form == "unet_v":
        path, prediction = DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), V()
    if form == "unet_edm":
        path, prediction = VE(80.0), Karras(0.7)
    shift = {"unet": 2.0, "mmdit": 3.0}.get(form, 1.0)
    schedule = default_schedule(path, prediction, family, shift)
    net = tiny.mmdit() if form == "mmdit" else tiny.unet()
    return Parts(net, tiny.vae(shift_factor=0.3 if form == "mmdit" else None, **kw), tiny.text(family), schedule)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Of each form the parts and their exported folder."""
    made = {}
    for form in FORMS:
        given, place = parts(form), tmp_path_factory.mktemp(form)
        s = given.schedule
        folder = export(
            place / "pipeline", net=given.net, vae=given.vae, text=given.text, path=s.path, prediction=s.prediction,
            shift=s.shift,
        )  # fmt: skip
        made[form] = SimpleNamespace(form=form, parts=given, folder=folder, place=place)
    return made


@pytest.fixture(scope="module")
def drawn_by_stock(folders) -> list[str]:
    """Leaves stock's latents and pictures beside each folder; the names of the pipelines that drew them."""
    for made in folders.values():
        save_file({"noise": noise()}, made.place / "noise.safetensors")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", STOCK_SCRIPT % (PROMPTS, NEGATIVE), *(str(m.folder) for m in folders.values())],
        cwd=folders["unet"].place, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.fixture(params=FORMS)
def saved(request, folders) -> SimpleNamespace:
    return folders[request.param]


def noise(rows: int = len(PROMPTS), seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, *PICTURE, generator=torch.Generator().manual_seed(seed))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(form: str) -> TextToImagePipeline:
    return quiet(TextToImagePipeline.from_parts(parts(form)))


# --- point 6 of the first evening --------------------------------------------------------------------------------


def test_stock_diffusers_draws_the_same_without_this_package(saved, drawn_by_stock):
    expected = "StableDiffusion3Pipeline" if saved.form == "mmdit" else "StableDiffusionPipeline"
    assert drawn_by_stock[FORMS.index(saved.form)] == expected
    stock = load_file(saved.place / "stock.safetensors")
    pipe = quiet(TextToImagePipeline.from_pretrained(saved.folder))
    latents = pipe(PROMPTS, negative_prompt=NEGATIVE, latents=noise(), output_type="latent", **CALL).images
    pictures = pipe(PROMPTS, negative_prompt=NEGATIVE, latents=noise(), output_type="np", **CALL).images
    # The bound is the promise made to users. Measured is 3e-6 to 6e-5: float32 over 20 steps of two implementations,
    # which sum in another order.
    assert latents.std() > 0.1
    assert (latents - stock["latents"]).abs().max() < 1e-4
    assert np.abs(pictures - stock["pictures"].numpy()).max() < 1e-4
    assert pictures.std() > 0.01 and pictures.min() >= 0 and pictures.max() <= 1


def test_the_folder_names_stock_classes_alone(saved):
    index = json.loads((saved.folder / "model_index.json").read_text())
    libraries = {value[0] for value in index.values() if isinstance(value, list)}
    assert libraries <= {"diffusers", "transformers", None}
    files = [f for f in saved.folder.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".safetensors", ".txt"}
    assert not any(str(saved.place) in f.read_text() for f in files if f.suffix == ".json")


def test_text_is_written_for_older_readers_too(saved):
    with safe_open(saved.folder / "text_encoder" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    vocabulary = json.loads((saved.folder / "tokenizer" / "vocab.json").read_text())
    assert vocabulary == saved.parts.text.tokenizer.get_vocab()
    merges = (saved.folder / "tokenizer" / "merges.txt").read_text().splitlines()
    assert merges[0].startswith("#version") and all(len(pair.split(" ")) == 2 for pair in merges[1:])


def test_parts_come_back(saved):
    again = load_parts(saved.folder)
    assert again.schedule == saved.parts.schedule
    assert again.text.family == saved.parts.text.family and again.text.max_length == tiny.LENGTH
    for name in ("net", "vae", "text"):
        expected, got = getattr(saved.parts, name).state_dict(), getattr(again, name).state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert again.vae.latent_scale == saved.parts.vae.latent_scale


def test_a_stock_pipeline_is_taken_over_with_its_weights(saved):
    stock = quiet(DiffusionPipeline.from_pretrained(saved.folder))
    pipe = quiet(TextToImagePipeline.from_diffusers(stock))
    shared = {p.data_ptr() for p in pipe.net.parameters()}
    assert shared == {p.data_ptr() for p in getattr(stock, "unet", getattr(stock, "transformer", None)).parameters()}
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    call = dict(num_inference_steps=4, guidance_scale=2.0, output_type="latent")
    expected = stock(PROMPTS, generator=generators, **call).images
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    assert (pipe(PROMPTS, generator=generators, **call).images - expected).abs().max() < 1e-4


# --- the call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["unet", "mmdit"])
def test_a_batch_equals_single_calls(form):
    pipe, call = ours(form), dict(num_inference_steps=4, guidance_scale=3.0, output_type="pt")
    batch = pipe(PROMPTS, generator=[torch.Generator().manual_seed(i) for i in range(3)], **call).images
    for i, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, generator=torch.Generator().manual_seed(i), **call).images
        assert torch.allclose(alone[0], batch[i], atol=1e-5)  # sums of another batch size
    assert (batch[0] - batch[1]).abs().max() > 1e-3


def test_several_pictures_of_each_prompt_follow_one_another():
    pipe, call = ours("unet"), dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    start = noise(4)
    negatives = ["green", "blue"]
    four = pipe(PROMPTS[:2], negative_prompt=negatives, num_images_per_prompt=2, latents=start, **call).images
    for i in range(4):
        one = pipe(PROMPTS[i // 2], negative_prompt=negatives[i // 2], latents=start[i : i + 1], **call).images
        assert torch.allclose(one[0], four[i], atol=1e-5)


def test_embeddings_stand_for_their_texts():
    pipe, call = ours("unet"), dict(num_inference_steps=2, latents=noise(1), output_type="latent")
    with torch.no_grad():
        embeds = {"prompt_embeds": pipe.text.encode(["zebra"]).tokens}
        embeds["negative_prompt_embeds"] = pipe.text.encode(["green"]).tokens
    from_text = pipe("zebra", negative_prompt="green", **call).images
    assert torch.allclose(pipe(**embeds, **call).images, from_text, atol=1e-6)


def test_without_guidance_the_negative_prompt_says_nothing():
    pipe, call = ours("unet"), dict(num_inference_steps=2, latents=noise(1), output_type="latent", guidance_scale=1.0)
    assert torch.equal(pipe("zebra", **call).images, pipe("zebra", negative_prompt="green", **call).images)


def test_guidance_rescale_equals_stock(folders):
    given = folders["unet_v"]
    call = dict(num_inference_steps=5, guidance_scale=6.0, guidance_rescale=0.7, output_type="latent", latents=noise())
    stock = quiet(StableDiffusionPipeline.from_pretrained(given.folder))
    expected = stock(PROMPTS, **call).images
    pipe = quiet(TextToImagePipeline.from_parts(given.parts))
    assert (pipe(PROMPTS, **call).images - expected).abs().max() < 1e-4
    assert (pipe(PROMPTS, **(call | {"guidance_rescale": 0.0})).images - expected).abs().max() > 1e-2


def test_defaults_are_the_stock_pipelines():
    for form, steps, scale in (("unet", 50, 7.5), ("mmdit", 28, 7.0)):
        pipe = ours(form)
        assert pipe("zebra", output_type="latent").images.shape == (1, *PICTURE)
        assert (pipe.num_timesteps, pipe.guidance_scale) == (steps, scale)


def test_output_types():
    pipe, call = ours("unet"), dict(num_inference_steps=2, latents=noise(1))
    pt, array = (pipe("zebra", output_type=kind, **call).images for kind in ("pt", "np"))
    picture = pipe("zebra", **call).images[0]
    assert pt.shape == (1, 3, 16, 16) and array.shape == (1, 16, 16, 3) and picture.size == (16, 16)
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.asarray(picture), (array[0] * 255).round().astype("uint8"))
    assert isinstance(pipe("zebra", return_dict=False, **call), tuple)


def test_height_and_width_are_pixels():
    call = dict(num_inference_steps=1, output_type="pt")
    assert ours("unet")("zebra", height=24, width=32, **call).images.shape == (1, 3, 24, 32)
    assert ours("mmdit")("zebra", height=8, width=16, **call).images.shape == (1, 3, 8, 16)


def test_a_callback_sees_each_step_and_may_change_the_latents():
    pipe, seen = ours("unet"), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    images = pipe(
        "zebra", num_inference_steps=3, latents=noise(1), output_type="latent", callback_on_step_end=callback
    ).images
    assert [s[0] for s in seen] == [0, 1, 2] and seen[0][1] > seen[1][1] > seen[2][1]
    assert not images.any()


def test_an_interrupt_stops_and_gives_what_there_is():
    pipe, seen = ours("unet"), []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        pipe._interrupt = step == 1

    call = dict(num_inference_steps=6, latents=noise(1), output_type="latent", callback_on_step_end=callback)
    assert torch.equal(pipe("zebra", **call).images, seen[-1]) and len(seen) == 2


def test_samplers_by_name():
    pipe, call = ours("unet"), dict(num_inference_steps=6, latents=noise(1), output_type="latent")
    drawn = {}
    for name in SAMPLERS:
        drawn[name] = pipe("zebra", sampler=name, generator=torch.Generator().manual_seed(0), **call).images
        assert drawn[name].isfinite().all()
    assert torch.equal(drawn["dpmpp_2m"], pipe("zebra", **call).images)  # the folder's own
    assert not torch.allclose(drawn["ddpm"], drawn["ddim"], atol=1e-2)
    full = pipe("zebra", sampler="ddim", eta=1.0, generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(full, drawn["ddpm"])


def test_the_pipeline_changes_precision():
    pipe = ours("mmdit").to(torch.bfloat16)
    assert pipe.dtype == pipe.net.dtype == pipe.vae.dtype == pipe.text.dtype == torch.bfloat16
    picture = pipe("zebra", num_inference_steps=2, output_type="np").images
    assert picture.dtype == np.float32 and np.isfinite(picture).all()


def test_core_draws_what_the_pipeline_draws():
    pipe = ours("unet")
    call = dict(generator=torch.Generator().manual_seed(3), guidance_scale=4.0)
    expected = pipe(PROMPTS, num_inference_steps=4, output_type="pt", **call).images
    call["generator"] = torch.Generator().manual_seed(3)
    assert torch.allclose(generate(pipe.parts, PROMPTS, steps=4, **call), expected, atol=1e-6)


def test_start_latents_are_stocks():
    from diffusers.utils.torch_utils import randn_tensor

    for seeds in (7, [7, 8]):
        make = [[torch.Generator().manual_seed(s) for s in seeds] if isinstance(seeds, list)
                else torch.Generator().manual_seed(seeds) for _ in range(2)]  # fmt: skip
        stock = randn_tensor((2, *PICTURE), generator=make[0], dtype=torch.bfloat16)
        assert torch.equal(start_latents((2, *PICTURE), make[1], dtype=torch.bfloat16), stock)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(output_type="jpeg"), "output_type 'jpeg'"),
        (dict(sampler="ddmi"), "sampler 'ddmi' is not one of"),
        (dict(num_inference_steps=0), "num_inference_steps is 0"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt is 0"),
        (dict(height=15), "height is 15, expected a multiple of 2"),
        (dict(height=10, width=10), "nearest that fits"),
        (dict(latents=torch.zeros(2, *PICTURE)), r"latents: \(2, 4, 8, 8\)"),
        (dict(generator=[torch.Generator()] * 2), "a list of 2 for 1 pictures"),
        (dict(negative_prompt=["a", "b"]), "negative_prompt: 2 for 1 prompts"),
        (dict(prompt_embeds=torch.zeros(1, 12, 16)), "either prompt or prompt_embeds"),
        (dict(prompt=None), "either prompt or prompt_embeds"),
        (dict(prompt=[]), "one or more texts"),
        (dict(negative_prompt_embeds=torch.zeros(1, 12, 5)), "negative_prompt_embeds"),
        (dict(guidance_rescale=2.0), "rescale is 2"),
        (dict(callback_on_step_end_tensor_inputs=["prompt_embeds"]), "only"),
    ],
)
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ours("unet")(**({"prompt": "zebra", "num_inference_steps": 1} | wrong))


# --- folders that are not as they should be ----------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "copy"))


def test_an_older_export_is_replaced_and_nothing_else_left(folders, tmp_path):
    folder = copied(folders["unet_v"].folder, tmp_path)
    save_parts(folder, folders["unet"].parts)
    assert listing(folder) == listing(folders["unet"].folder)
    assert list(tmp_path.iterdir()) == [folder]
    TextToImagePipeline.from_pretrained(folder).save_pretrained(folder)  # onto itself, its files open
    assert listing(folder) == listing(folders["unet"].folder)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: (p / "holiday.jpg").write_bytes(b"1"), "holiday.jpg but no model_index.json"),
        (lambda p: shutil.rmtree(p) or p.write_text("x"), "in the way"),
        (lambda p: [(p / n).write_text("{}") for n in ("model_index.json", "thesis.tex")], "thesis.tex"),
    ],
)
def test_anything_but_a_pipeline_is_never_overwritten(tmp_path, folders, prepare, message):
    folder = tmp_path / "mine"
    folder.mkdir()
    prepare(folder)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_parts(folder, folders["unet"].parts)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("form", ["unet", "mmdit"])
def test_an_export_that_does_not_read_back_leaves_the_old_one(folders, tmp_path, monkeypatch, form):
    """Each part is damaged between writing and reading; the comparison must notice."""
    import pipelines.folder as module

    folder, write = copied(folders[form].folder, tmp_path), module._write_for_older_readers
    before = listing(folder)
    net = "transformer" if form == "mmdit" else "unet"
    for part, file in ((net, "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):

        def damage(beside, weights=f"{part}/{file}.safetensors"):
            write(beside)
            state = load_file(beside / weights)
            name = min(key for key in state if key.endswith("weight"))
            state[name] = state[name] * 1.001
            save_file(state, beside / weights, metadata={"format": "pt"})

        monkeypatch.setattr(module, "_write_for_older_readers", damage)
        with pytest.raises(RuntimeError, match="does not come back as it was"):
            save_parts(folder, folders[form].parts)
    for part, key, value in ((net, "norm_eps", 0.3), ("vae", "norm_num_groups", 2)) if form == "unet" else ():

        def reconfigure(beside, config=f"{part}/config.json", change={key: value}):  # noqa: B006
            write(beside)
            (beside / config).write_text(json.dumps(json.loads((beside / config).read_text()) | change))

        monkeypatch.setattr(module, "_write_for_older_readers", reconfigure)
        with pytest.raises(RuntimeError, match="answers otherwise in stock form"):
            save_parts(folder, folders[form].parts)
    assert listing(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_an_export_draws_no_random_number_and_leaves_modes_alone(tmp_path, folders):
    given = parts("mmdit")
    given.net.train()
    state = torch.get_rng_state()
    save_parts(tmp_path / "pipeline", given)
    assert torch.equal(torch.get_rng_state(), state)
    assert given.net.training and not given.vae.training
    assert given.vae.config["shift_factor"] == 0.3


def test_half_precision_is_written_as_it_is(tmp_path):
    given = parts("mmdit")
    given.net.to(torch.bfloat16)
    given.text.to(torch.bfloat16)
    again = load_parts(save_parts(tmp_path / "pipeline", given))
    assert again.net.dtype == again.text.dtype == again.vae.dtype == torch.float32
    for name, value in load_file(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors").items():
        assert value.dtype == torch.bfloat16 and torch.equal(again.net.state_dict()[name], value.float())
    assert load_parts(tmp_path / "pipeline", torch.bfloat16).vae.dtype == torch.bfloat16


def with_nan() -> Parts:
    given = parts("unet")
    nn.init.constant_(given.net.conv_in.bias, float("nan"))
    return given


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_nan, "NaN or infinity in conv_in.bias"),
        (lambda: replace(parts("unet"), text=tiny.text("sd3")), "takes text family 'sd'"),
        (lambda: replace(parts("unet"), vae=tiny.vae(shift_factor=0.5)), "ignores the VAE's shift_factor"),
        (
            lambda: replace(parts("unet"), vae=tiny.vae(latent_channels=8)),
            "in_channels is 4, the VAE's latent_chan.* 8",
        ),
        (lambda: replace(parts("unet"), net=tiny.unet(cross_attention_dim=20)), "cross_attention_dim is 20"),
        (lambda: replace(parts("mmdit"), net=tiny.mmdit(pooled_projection_dim=12)), "pooled_projection_dim is 12"),
        (lambda: replace(parts("mmdit"), text=tiny.text("sd3", joint_width=20)), "joint_attention_dim is 24"),
        (lambda: replace(parts("unet"), net=tiny.vae()), "VAE has no stock pipeline"),
        (lambda: replace(parts("unet"), schedule=default_schedule(CosineVP(), V(), "sd")), "no stock form"),
    ],
)
def test_parts_that_no_stock_pipeline_takes_are_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        save_parts(tmp_path / "pipeline", make())
    assert not list(tmp_path.iterdir())


def test_a_path_without_a_stock_form_is_drawn_by_ours():
    given = replace(parts("unet"), schedule=default_schedule(CosineVP(), V(), "sd"))
    assert generate(given, ["zebra"], steps=3).shape == (1, 3, 16, 16)


def edit(name, **values):
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


def lose(name, key):
    def change(folder):
        state = load_file(folder / name)
        del state[key]
        save_file(state, folder / name, metadata={"format": "pt"})

    return change


def as_pickle(folder):
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")


INDEX, NET = "model_index.json", "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda f: (f / INDEX).unlink(), r"model_index\.json: missing"),
        (lambda f: (f / INDEX).write_text("{"), r"model_index\.json: not JSON"),
        (lambda f: (f / INDEX).write_text("[]"), r"model_index\.json: expected a JSON object"),
        (edit(INDEX, _class_name="FluxPipeline"), r"model_index\.json: _class_name is 'FluxPipeline'"),
        (edit(INDEX, _class_name=["evil", "Pipeline"]), r"model_index\.json: _class_name is \['evil', 'Pipeline'\]"),
        (edit(INDEX, unet=["evil", "UNet"]), r"model_index\.json: unet is \['evil', 'UNet'\]"),
        (edit(INDEX, vae=["diffusers", "AutoencoderTiny"]), r"model_index\.json: vae is"),
        (lambda f: shutil.rmtree(f / "vae"), r"vae/config\.json: missing"),
        (as_pickle, "unet: no safetensors file"),
        (lambda f: (f / "tokenizer/tokenizer.json").unlink() or (f / "tokenizer/vocab.json").unlink(), "no tokenizer"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), r"scheduler_config\.json: missing"),
        (edit("scheduler/scheduler_config.json", _class_name="evil"), "'evil' is not a scheduler"),
        (lose(NET, "conv_out.weight"), "lacks 1 weights of UNet2DConditionModel, the first is conv_out.weight"),
        (lose("text_encoder/model.safetensors", "text_model.final_layer_norm.bias"), "lacks 1 weights of CLIPText"),
        (edit("unet/config.json", act_fn="gelu"), "act_fn='gelu' is not supported"),
    ],
)
def test_a_folder_that_is_no_pipeline_of_ours_is_refused(folders, tmp_path, damage, message, monkeypatch):
    folder = copied(folders["unet"].folder, tmp_path)
    damage(folder)
    (tmp_path / "evil.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        TextToImagePipeline.from_pretrained(folder)
    assert "evil" not in sys.modules


@pytest.mark.parametrize("part", ["text_encoder_2", "text_encoder_3"])
def test_sd3_with_more_encoders_than_one_is_refused(folders, tmp_path, part):
    folder = copied(folders["mmdit"].folder, tmp_path)
    weights = folder / part / "model.safetensors"
    save_file({k: torch.ones_like(v) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part}.* is a real text encoder"):
        load_parts(folder)
    with pytest.raises(ValueError, match=f"{part} is a real text encoder"):
        TextToImagePipeline.from_diffusers(DiffusionPipeline.from_pretrained(folder))


def test_a_scheduler_without_a_counterpart_still_tells_how_the_network_was_trained(folders, tmp_path, caplog):
    from diffusers import PNDMScheduler

    folder = copied(folders["unet_v"].folder, tmp_path)
    scheduler = StableDiffusionPipeline.from_pretrained(folder).scheduler
    PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    edit(INDEX, scheduler=["diffusers", "PNDMScheduler"])(folder)
    assert load_parts(folder).schedule == folders["unet_v"].parts.schedule
    assert "PNDMScheduler" in caplog.text and "dpmpp_2m" in caplog.text


def test_a_hub_name_that_cannot_be_had_says_so():
    with pytest.raises(ValueError, match="nobody/nothing: no such folder, and not opened as a name on the hub"):
        TextToImagePipeline.from_pretrained("nobody/nothing")
