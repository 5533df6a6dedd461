"""A pipeline folder as one CompVis-style file and back: stock's own single-file loader and stock pipelines judge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tiny import randomize, tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from pipelines.convert import convert

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FAMILIES = ("sd15", "sd21", "sdxl", "sd3", "sd35")


def clip(kind, width: int, projection: int, act: str, seed: int):
    known = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(known), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=known.model_max_length, projection_dim=projection, hidden_act=act,
        bos_token_id=known.bos_token_id, eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
    )  # fmt: skip
    return randomize(kind(config), seed)


def vae(channels: int = 4, **kw) -> AutoencoderKL:
    levels = 3  # an odd number: a mirror of levels that is off by one shows
    config = dict(
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=channels, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip
    return randomize(AutoencoderKL(**(config | kw)), 2)


def unet(context: int, **kw) -> UNet2DConditionModel:
    config = dict(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=context, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return randomize(UNet2DConditionModel(**(config | kw)), 3)


def mmdit(**kw) -> SD3Transformer2DModel:
    config = dict(
        sample_size=8, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=3,
        caption_projection_dim=24, joint_attention_dim=40, pooled_projection_dim=16 + 20, pos_embed_max_size=12,
    )  # fmt: skip
    return randomize(SD3Transformer2DModel(**(config | kw)), 4, 0.08)


def pipeline(family: str) -> DiffusionPipeline:
    """A tiny stock pipeline of this family, random everywhere."""
    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    if family in ("sd15", "sd21"):
        wide = family == "sd21"
        kind = "v_prediction" if wide else "epsilon"
        return StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip(CLIPTextModel, 16, 16, "gelu" if wide else "quick_gelu", 5),
            tokenizer=tokenizer(),
            unet=unet(16, use_linear_projection=wide),
            scheduler=DDIMScheduler(
                **schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=kind
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    if family == "sdxl":
        net = unet(
            16 + 24, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 20, transformer_layers_per_block=(1, 2, 3),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        return StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=clip(CLIPTextModel, 16, 16, "quick_gelu", 5),
            text_encoder_2=clip(CLIPTextModelWithProjection, 24, 20, "gelu", 6),
            tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=net,
            scheduler=EulerDiscreteScheduler(**schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        )  # fmt: skip
    first = clip(CLIPTextModelWithProjection, 16, 16, "quick_gelu", 5)
    with torch.no_grad():
        first.text_projection.weight.copy_(torch.eye(16))  # all that a single file's readers take
    known = T5Config(
        vocab_size=len(tokenizer()), d_model=40, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    newer = dict(dual_attention_layers=(0, 1), qk_norm="rms_norm") if family == "sd35" else {}
    return StableDiffusion3Pipeline(
        transformer=mmdit(**newer),
        vae=vae(16, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=first,
        text_encoder_2=clip(CLIPTextModelWithProjection, 24, 20, "gelu", 6),
        text_encoder_3=randomize(T5EncoderModel(known), 7),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), tokenizer_3=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def weights(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, value in module.state_dict().items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny pipeline for each family, in float32, and its single file beside it."""
    made = {}
    for family in FAMILIES:
        place = tmp_path_factory.mktemp(family)
        pipeline(family).save_pretrained(place / "folder")
        convert(place / "folder", place / "single.safetensors")
        made[family] = place
    return made


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=dtype)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """What the files of a pipeline folder hold; transformers 5 writes a CLIP's names shorter than it did before."""
    return {
        f"{file.parent.name}.{name.removeprefix('text_model.')}": value
        for file in folder.glob("*/*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_exact(family: str, dtype: str, folders: dict[str, Path], tmp_path: Path):
    """Stored in this precision, to a file and back."""
    place = folders[family] / "folder"
    shutil.copytree(place, tmp_path / "a")
    for file in (tmp_path / "a").glob("*/*.safetensors"):
        lower = {name: value.to(DTYPES[dtype]) for name, value in load_file(file).items()}
        save_file(lower, file, metadata={"format": "pt"})
    convert(tmp_path / "a", tmp_path / "b.safetensors")
    assert {x.dtype for x in load_file(tmp_path / "b.safetensors").values() if x.numel()} == {DTYPES[dtype]}
    convert(tmp_path / "b.safetensors", tmp_path / "c", config=tmp_path / "a")
    assert len(stored(tmp_path / "a")) > 300
    same(stored(tmp_path / "a"), stored(tmp_path / "c"))


def settings(part) -> dict:
    """Config, without what only says where it was loaded from, and by which version."""
    known = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    return {k: v for k, v in known.items() if not k.startswith("_") and k != "transformers_version"}


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_equal(family: str, folders: dict[str, Path], tmp_path: Path):
    """Folder -> file -> folder with nothing but tokenizers to go by: the file itself knows its sizes and schedule."""
    place = folders[family]
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if (place / "folder" / name).is_dir():
            (tmp_path / "words" / name).mkdir(parents=True)
            for file in (place / "folder" / name).iterdir():
                (tmp_path / "words" / name / file.name).write_bytes(file.read_bytes())
    convert(place / "single.safetensors", tmp_path / "again", config=tmp_path / "words")

    before, after = opened(place / "folder"), opened(tmp_path / "again")
    assert type(before) is type(after)
    same(weights(before), weights(after))
    for name, part in before.components.items():
        if hasattr(part, "config"):
            assert settings(part) == settings(after.components[name])

    def draw(pipe: DiffusionPipeline) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            "a red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt",
            height=32, width=32,
        ).images  # fmt: skip

    a, b = draw(before), draw(after)
    assert a.std() > 0.01 and torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_reads_the_file(family: str, folders: dict[str, Path]):
    """``from_single_file(config=folder)`` of the stock pipeline gives every weight back."""
    place = folders[family]
    before = opened(place / "folder")
    after = type(before).from_single_file(str(place / "single.safetensors"), config=str(place / "folder"))
    same(weights(before), weights(after))


@pytest.mark.parametrize(
    ("family", "kind", "part"),
    [
        ("sd15", UNet2DConditionModel, "unet"),
        ("sdxl", UNet2DConditionModel, "unet"),
        ("sd3", SD3Transformer2DModel, "transformer"),
        ("sd21", AutoencoderKL, "vae"),
        ("sd35", AutoencoderKL, "vae"),
    ],
)
def test_stock_reads_one_part(family: str, kind: type, part: str, folders: dict[str, Path]):
    place = folders[family]
    model = kind.from_single_file(str(place / "single.safetensors"), config=str(place / "folder"), subfolder=part)
    same(getattr(opened(place / "folder"), part).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_rounds_once_in_both_directions(dtype: str, folders: dict[str, Path], tmp_path: Path):
    place = folders["sd3"]
    convert(place / "folder", tmp_path / "x.safetensors", dtype=dtype)
    convert(place / "single.safetensors", tmp_path / "y", dtype=dtype, config=place / "folder")
    single, whole = load_file(tmp_path / "x.safetensors"), load_file(place / "single.safetensors")
    same(single, {name: value.to(DTYPES[dtype]) for name, value in whole.items()})
    lower = {name: value.to(DTYPES[dtype]) for name, value in stored(place / "folder").items()}
    same(stored(tmp_path / "y"), lower)


def test_metadata_is_modelspec(folders: dict[str, Path]):
    from hashlib import sha256

    from safetensors import safe_open

    expected = {
        "sd15": ("stable-diffusion-v1", "epsilon"),
        "sd21": ("stable-diffusion-v2-768-v", "v"),
        "sdxl": ("stable-diffusion-xl-v1-base", "v"),
        "sd3": ("stable-diffusion-3-medium", "flow"),
        "sd35": ("stable-diffusion-3.5-medium", "flow"),
    }
    for family, (architecture, prediction) in expected.items():
        file = folders[family] / "single.safetensors"
        with safe_open(file, framework="pt") as f:
            said = {k.removeprefix("modelspec."): v for k, v in f.metadata().items() if k.startswith("modelspec.")}
        raw = file.read_bytes()
        data = raw[8 + int.from_bytes(raw[:8], "little") :]
        assert said.pop("hash_sha256") == f"0x{sha256(data).hexdigest()}"
        assert len(said.pop("date")) == len("2026-01-31")
        assert said == {
            "sai_model_spec": "1.0.0",
            "architecture": architecture,
            "implementation": "sgm",
            "title": "single",
            "resolution": "32x32",
            "prediction_type": prediction,
        }


def test_v_prediction_is_marked_as_each_family_knows_it(folders: dict[str, Path], tmp_path: Path):
    import yaml

    marks = load_file(folders["sdxl"] / "single.safetensors")
    assert marks["v_pred"].shape == marks["ztsnr"].shape == (0,)
    params = yaml.safe_load((folders["sd21"] / "single.yaml").read_text())["model"]["params"]
    assert params["parameterization"] == "v" and params["scale_factor"] == 0.18215
    net = params["unet_config"]["params"]
    assert (net["model_channels"], net["channel_mult"], net["context_dim"]) == (8, [1, 2, 2], 16)
    assert (net["attention_resolutions"], net["num_heads"]) == ([2, 1], 2)
    assert not (folders["sd15"] / "single.yaml").exists() and "v_pred" not in load_file(
        folders["sd15"] / "single.safetensors"
    )


def test_the_second_stable_diffusion_has_its_weights_fused(folders: dict[str, Path]):
    """By the CompVis side alone: q, k, v in one, in this order; the projection of OpenCLIP-G transposed."""
    pipe, file = opened(folders["sd21"] / "folder"), load_file(folders["sd21"] / "single.safetensors")
    attention = pipe.text_encoder.encoder.layers[1].self_attn
    fused = file["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(fused, torch.cat([getattr(attention, f"{x}_proj").weight for x in "qkv"]))
    pipe, file = opened(folders["sdxl"] / "folder"), load_file(folders["sdxl"] / "single.safetensors")
    assert torch.equal(
        file["conditioner.embedders.1.model.text_projection"], pipe.text_encoder_2.text_projection.weight.T
    )


def test_what_no_layout_needs_is_ignored(folders: dict[str, Path], tmp_path: Path):
    place = folders["sd15"]
    state = load_file(place / "single.safetensors")
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    junk = ["model_ema.decay", "model_ema.diffusion_modelout0weight", "betas", "alphas_cumprod", "sqrt_alphas_cumprod",
            "first_stage_model.loss.logvar", "cond_stage_model.logit_scale", position, "log_one_minus_alphas_cumprod",
            "cond_stage_model.transformer.text_projection.weight"]  # fmt: skip
    save_file(state | {name: torch.zeros(3) for name in junk}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y", config=place / "folder")
    same(weights(opened(place / "folder")), weights(opened(tmp_path / "y")))


def test_old_names_are_read(folders: dict[str, Path], tmp_path: Path):
    """The first files had no ``text_model``; the first folders' autoencoders had ``query`` for ``to_q``."""
    place = folders["sd15"]
    state = load_file(place / "single.safetensors")
    old = {name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): x
           for name, x in state.items()}  # fmt: skip
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y", config=place / "folder")
    weight = tmp_path / "y" / "vae" / "diffusion_pytorch_model.safetensors"
    vae = load_file(weight)
    for new, was in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        vae = {name.replace(f"attentions.0.{new}.", f"attentions.0.{was}."): x for name, x in vae.items()}
    save_file(vae, weight, metadata={"format": "pt"})
    convert(tmp_path / "y", tmp_path / "z.safetensors")
    same(load_file(tmp_path / "z.safetensors"), state)


def test_a_file_without_a_t5_makes_a_folder_without_one(folders: dict[str, Path], tmp_path: Path):
    place = folders["sd3"]
    state = {n: x for n, x in load_file(place / "single.safetensors").items() if "t5xxl" not in n}
    del state["text_encoders.clip_l.transformer.text_projection.weight"]  # the published file may lack it: identity
    save_file(state, tmp_path / "x.safetensors")
    words = tmp_path / "words"
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (words / name).mkdir(parents=True)
        for file in (place / "folder" / name).iterdir():
            if file.suffix != ".safetensors":
                (words / name / file.name).write_bytes(file.read_bytes())
    convert(tmp_path / "x.safetensors", tmp_path / "y", config=words)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "y", local_files_only=True, text_encoder_3=None, tokenizer_3=None
    )
    before = {n: x for n, x in weights(opened(place / "folder")).items() if not n.startswith("text_encoder_3")}
    same(before, weights(pipe))
    assert pipe.scheduler.config.shift == 3.0
    index = json.loads((tmp_path / "y" / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
