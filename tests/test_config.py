"""Configs: what is read, what is refused and in which words; all of it before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.config import dump, load, overrides_of, parse, relocate
from training.fit import ConfigError, check_together
from training.schema import AutoencoderConfig, AutoencoderLoss, ClipConfig, Config, DiffusionConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [x for x in sorted((ROOT / "configs").rglob("*.yaml")) if x.parent.name != "accelerate"]  # its own format

BASE = {"output_dir": "out", "data": {"path": "pictures"}, "train": {"images": 100}}
MINIMAL = {
    "autoencoder": {"task": "autoencoder", **BASE},
    "clip": {"task": "clip", **BASE},
    "unet": {
        "task": "diffusion", **BASE, "vae": {"pretrained": "v"}, "text": {"pretrained": "t"}, "model": {"name": "unet"},
    },
    "mmdit": {
        "task": "diffusion", **BASE, "vae": {"pretrained": "v"}, "text": {"pretrained": "t"},
        "model": {"name": "mmdit"},
    },
}  # fmt: skip


def merged(raw: dict, changes: dict) -> dict:
    """``raw`` with dotted keys set."""
    out = json.loads(json.dumps(raw))
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = out
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return out


def made(kind: str, **changes) -> Config:
    return parse(merged(MINIMAL[kind], {k.replace("__", "."): v for k, v in changes.items()}), kind)


def written(folder: Path, raw: dict, name: str = "x.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(raw))
    return file


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MINIMAL)
def test_defaults_survive_the_file(kind: str, tmp_path: Path):
    config = parse(MINIMAL[kind], kind)
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    again = load(file)
    assert again == config
    assert type(again) is type(config)
    assert dump(again) == dump(config)
    assert "keep_last: 2" in dump(config)  # defaults are written out


def test_values_that_are_no_defaults_survive_the_file(tmp_path: Path):
    changes = {
        "optimizer.learning_rate": 3.3e-7, "train.mixed_precision": "no", "seed": 2**63 - 1, "output_dir": "é — 1e3",
        "sample.prompts": ["yes", "1e-4", "no: really", "null", "# a hash"], "model.attention_levels": [True, False],
        "model.block_out_channels": [32, 64], "timesteps.mean": -0.1,
    }  # fmt: skip
    config = parse(merged(MINIMAL["unet"], changes), "x")
    assert isinstance(config, DiffusionConfig)
    file = tmp_path / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    again = load(file)
    assert again == config
    assert isinstance(again, DiffusionConfig)
    assert again.sample.prompts == ("yes", "1e-4", "no: really", "null", "# a hash")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: str(f.relative_to(ROOT)))
def test_shipped_configs_load(file: Path, tmp_path: Path):
    config = load(file)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config


def demo() -> list[Config]:
    return [load(ROOT / "configs" / "openmoji" / f"{name}.yaml") for name in ("clip", "vae", "unet")]


def test_the_demo_fits_together(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing has been made yet
    configs = demo()
    assert [type(c) for c in configs] == [ClipConfig, AutoencoderConfig, DiffusionConfig]
    check_together(configs)


def test_a_stage_before_what_it_needs_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"vae\.pretrained: outputs/demo/vae .*no earlier config makes it"):
        check_together(demo()[::-1])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e+1", 25.0), ("5e-05", 5e-5), (".5e-3", 5e-4), ("0.01", 0.01), ("1", 1.0)],
)
def test_numbers_are_written_as_people_write_them(text: str, value: float, tmp_path: Path):
    file = written(tmp_path, MINIMAL["clip"])
    file.write_text(file.read_text() + f"optimizer: {{learning_rate: {text}}}\n")
    assert load(file).optimizer.learning_rate == value
    assert load(file, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == value


def test_no_is_a_precision_and_not_a_boolean(tmp_path: Path):
    """YAML 1.1 reads a bare ``no`` as false."""
    file = written(tmp_path, MINIMAL["clip"])
    file.write_text(file.read_text().replace("images: 100", "images: 100\n  mixed_precision: no"))
    assert load(file).train.mixed_precision == "no"
    assert load(written(tmp_path, MINIMAL["clip"]), ["train.mixed_precision=no"]).train.mixed_precision == "no"
    assert load(file, ["data.random_flip=true"]).data.random_flip is True


def test_overrides(tmp_path: Path):
    file = written(tmp_path, MINIMAL["unet"])
    config = load(
        file,
        [
            "train.images=7",
            "sample.prompts=[a cat, 'a = b']",
            "ema_decay=0",
            "output_dir=a=b",
            "model.norm_num_groups=8",
        ],
    )
    assert isinstance(config, DiffusionConfig)
    assert (config.train.images, config.ema_decay, config.output_dir) == (7, 0, "a=b")
    assert config.sample.prompts == ("a cat", "a = b")
    assert config.model.norm_num_groups == 8
    assert load(file).train.images == 100


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.images", "expected key=value"),
        ("=3", "expected key=value"),
        ("output_dir.x=1", "output_dir is a value, not a section"),
        ("train.images=[1", "not a YAML value"),
        ("train.imagse=1", r"unknown key `train\.imagse`; did you mean `images`\?"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, MINIMAL["clip"]), [override])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        ("clip", "sed", r"unknown key `sed`; did you mean `seed`\?"),
        ("clip", "train.batchsize", r"unknown key `train\.batchsize`; did you mean `batch_size`\?"),
        ("clip", "model.text.hiden_size", r"unknown key `model\.text\.hiden_size`; did you mean `hidden_size`\?"),
        ("unet", "model.layer_per_block", r"`model\.layer_per_block`; did you mean `layers_per_block`\?"),
        ("mmdit", "model.patchsize", r"unknown key `model\.patchsize`; did you mean `patch_size`\?"),
        ("unet", "sample.zzz", r"unknown key `sample\.zzz`; known here: prompts, num_inference_steps"),
        ("unet", "unet", r"unknown key `unet`"),  # the name of a model, where its section belongs
        ("unet", "model.unet", r"unknown key `model\.unet`"),
        ("autoencoder", "model.mmdit", r"unknown key `model\.mmdit`"),
    ],
)
def test_unknown_keys_get_a_suggestion(kind: str, key: str, message: str):
    with pytest.raises(ConfigError, match=f"^here.yaml: .*{message}"):
        parse(merged(MINIMAL[kind], {key: 3}), "here.yaml")


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("clip", "train.images", "many", r"`train\.images`: .*integer.*got 'many'"),
        ("clip", "train.images", 1.5, r"`train\.images`: .*integer.*got 1\.5"),
        ("clip", "train.images", 0, r"`train\.images`: .*greater than 0, got 0"),
        ("clip", "optimizer.learning_rate", -1, r"`optimizer\.learning_rate`: .*greater than 0"),
        ("clip", "optimizer.learning_rate", float("inf"), r"`optimizer\.learning_rate`: .*finite"),
        ("unet", "timesteps.mean", float("nan"), r"`timesteps\.mean`: .*finite"),
        ("clip", "seed", 2**63, r"`seed`: .*less than"),
        ("clip", "ema_decay", 1.0, r"`ema_decay`: .*less than 1"),
        ("clip", "output_dir", 5, r"`output_dir`: .*string"),
        ("clip", "data", None, r"`data`: .*got None"),
        ("autoencoder", "model.block_out_channels", [32, "a"], r"`model\.block_out_channels\.1`: .*integer"),
        ("clip", "optimizer.lr_scheduler", "cosin", r"`optimizer\.lr_scheduler`: .*'cosine'.*got 'cosin'"),
        ("unet", "model", {"name": "uvit"}, r"`model`: .*'unet', 'mmdit', 'dit'"),
        ("unet", "model", {}, r"`model`: .*name"),
        ("clip", "task", "clips", r"task: 'clips' is not one of .*did you mean `clip`\?"),
        ("clip", "task", ["clip"], r"task: \['clip'\] is not one of"),
        ("clip", "task", None, r"task: None is not one of"),
    ],
)
def test_wrong_values_are_named(kind: str, key: str, value, message: str):
    with pytest.raises(ConfigError, match=f"^here.yaml: {message}"):
        parse(merged(MINIMAL[kind], {key: value}), "here.yaml")


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(merged(MINIMAL["clip"], {"sed": 1, "train.images": "x", "data": {}}), "here.yaml")
    assert len(str(caught.value).splitlines()) == 3
    assert "here.yaml: `data.path` is missing" in str(caught.value)


def test_files_that_are_no_config(tmp_path: Path):
    file = tmp_path / "x.yaml"
    with pytest.raises(ConfigError, match=r"x\.yaml: no such config file"):
        load(file)
    with pytest.raises(ConfigError, match="no such config file"):
        load(tmp_path)
    for content, message in [
        (b"task: [clip", "not valid YAML"),
        (b"task: \xff\xfe", "not valid YAML"),
        (b"- a\n- b\n", "expected `key: value` lines, found list"),
        (b"", "expected `key: value` lines, found NoneType"),
        (b"!!python/object:os.system {}", "not valid YAML"),
        (b"task: clip\ntrain: {images: 8}\n\ntrain: {seed: 1}\n", "`train` stands twice, in lines 2 and 4"),
        (b"task: clip\ntrain:\n  images: 8\n  images: 9\n", "`images` stands twice, in lines 3 and 4"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"x\.yaml: {message}"):
            load(file)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("clip", {"data.resolution": 60}, "data.resolution 60 is not a multiple of model.vision.patch_size"),
        ("clip", {"model.text.num_attention_heads": 5}, r"model\.text\.hidden_size 192 does not divide into 5"),
        ("clip", {"model.vision.num_attention_heads": 5}, r"model\.vision\.hidden_size 192 does not divide into 5"),
        ("clip", {"train.attention_backend": "plain"}, r"train\.attention_backend belongs to the autoencoder"),
        ("clip", {"train.gradient_checkpointing": True}, r"train\.gradient_checkpointing belongs to the autoencoder"),
        ("clip", {"data.random_crop": 32}, "random_crop belongs to the autoencoder"),
        ("autoencoder", {"data.resolution": 66}, r"resolution 66 .*factor 4; 64 is"),
        ("autoencoder", {"data.random_crop": 31}, r"random_crop 31 .*factor 4; 32 is"),
        ("autoencoder", {"data.random_crop": 128}, "larger than data.resolution 64"),
        ("autoencoder", {"model.block_out_channels": [32, 60]}, "60 is not a multiple of model.norm_num_groups 8"),
        ("unet", {"model.block_out_channels": [64, 65]}, "65 is not a multiple of model.norm_num_groups 32"),
        ("unet", {"model.attention_head_dim": 5}, "64 does not divide into 5 heads"),
        ("unet", {"model.attention_levels": [True]}, "one entry for each"),
    ],
)
def test_contradictions_in_one_config(kind: str, changes: dict, message: str):
    with pytest.raises(ConfigError, match=f"^here.yaml: .*{message}"):
        parse(merged(MINIMAL[kind], changes), "here.yaml")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("unet", {"prediction_type": "epsilon"}, "epsilon with path.name rectified_flow has no stock pipeline"),
        ("unet", {"path.name": "discrete"}, "flow_prediction with path.name discrete has no stock pipeline"),
        ("unet", {"path.name": "cosine", "prediction_type": "v_prediction"}, "path.name cosine has no stock pipeline"),
        ("mmdit", {"path.name": "discrete", "prediction_type": "epsilon"}, "mmdit needs path.name rectified_flow"),
        (
            "unet",
            {"path": {"name": "discrete", "rescale_betas_zero_snr": True}, "prediction_type": "epsilon"},
            "epsilon says nothing at the last step",
        ),
        (
            "unet",
            {"path.name": "discrete", "prediction_type": "epsilon", "timesteps.shift": 3.0},
            "timesteps.shift needs path.name rectified_flow",
        ),
    ],
)
def test_what_no_stock_pipeline_samples_is_not_trained(kind: str, changes: dict, message: str):
    config = parse(merged(MINIMAL[kind], changes), "here.yaml")  # to be drawn by `ldm inspect path`
    with pytest.raises(ConfigError, match=message):
        check_together([config])


def test_sections_of_several_kinds(tmp_path: Path):
    """A kind is told by its name, its keys are its own, and all of it comes back from the file."""
    changes = {
        "path": {"name": "discrete", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        "prediction_type": "v_prediction",
        "timesteps": {"name": "mode", "scale": 0.5, "stratified": True},
        "weighting": {"name": "min_snr", "gamma": 3.0},
    }
    config = parse(merged(MINIMAL["unet"], changes), "x")
    assert isinstance(config, DiffusionConfig)
    assert (config.path.name, config.path.num_train_timesteps, config.weighting.gamma) == ("discrete", 1000, 3.0)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config
    assert load(written(tmp_path, MINIMAL["unet"]), ["path.name=ve", "path.sigma_max=20"]).path.sigma_max == 20
    for section, given, message in [
        ("path", {"name": "karas"}, r"`path`: .*'rectified_flow', 'cosine'"),
        ("path", {"name": "ve", "sigma_min": 1}, r"unknown key `path\.sigma_min`; did you mean `sigma_max`"),
        ("path", {"beta_schedule": "linear"}, r"unknown key `path\.beta_schedule`"),  # rectified flow, by default
        ("timesteps", {"name": "log_normal", "std": 0}, r"`timesteps\.std`: .*greater than 0"),
        ("weighting", {"name": "min_snr", "gama": 5}, r"unknown key `weighting\.gama`; did you mean `gamma`"),
        ("weighting", "min_snr", r"`weighting`: .*got 'min_snr'"),
    ]:
        with pytest.raises(ConfigError, match=f"^here.yaml: {message}"):
            parse(MINIMAL["unet"] | {section: given}, "here.yaml")


# --- several configs -------------------------------------------------------------------------------------------------


def three(kind: str = "unet", vae: dict | None = None, **changes) -> list[Config]:
    clip = made("clip", output_dir="run/clip", model__text__hidden_size=96)
    autoencoder = parse(merged(MINIMAL["autoencoder"], {"output_dir": "run/vae", **(vae or {})}), "vae")
    given = {"output_dir": "run/net", "vae__pretrained": "run/vae", "text__pretrained": "run/clip"}
    return [clip, autoencoder, made(kind, **given | changes)]


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_stages_that_fit(kind: str):
    check_together(three(kind))
    check_together(three(kind, vae__pretrained="./run/x/../vae"))  # the same folder by another name
    check_together(three(kind, vae__pretrained="stabilityai/sd-vae-ft-mse", text__pretrained="openai/clip"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # factor 4 and two halvings: 72 / 4 = 18 -> 9, which is odd
        ({"data__resolution": 72}, r"resolution 72: .*factor-4 autoencoder run/vae the unet .*multiple of 16; 64 is"),
        ({"data__resolution": 66}, r"resolution 66: .*multiple of 16; 64 is"),
        ({"model__cross_attention_dim": 97}, r"cross_attention_dim 97: the text encoder run/clip gives 96"),
        ({"vae__pretrained": "run/clip"}, r"vae\.pretrained: run/clip is made by a clip task"),
        ({"text__pretrained": "run/vae"}, r"text\.pretrained: run/vae is made by a autoencoder task"),
        ({"output_dir": "run/vae/"}, "is the output_dir of two configs"),
        ({"vae__pretrained": "./nowhere"}, r"vae\.pretrained: \./nowhere holds no finished model"),
        ({"text__pretrained": "/nowhere"}, r"text\.pretrained: /nowhere holds no finished model"),
        ({"vae__pretrained": "run/other/vae"}, r"vae\.pretrained: run/other/vae holds no finished model"),
    ],
)
def test_stages_that_do_not_fit(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_together(three(**changes))


def test_stages_that_do_not_fit_the_unet_alone():
    with pytest.raises(ConfigError, match="latent shift, which the UNet's stock pipelines ignore"):
        check_together(three(vae={"latent_shift": True}))
    check_together(three("mmdit", vae={"latent_shift": True}))
    check_together(three(model__cross_attention_dim=96))


def test_stages_that_do_not_fit_the_mmdit():
    with pytest.raises(ConfigError, match=r"joint_attention_dim 97: must be at least text width \+ 2 = 98"):
        check_together(three("mmdit", model__joint_attention_dim=97))
    check_together(three("mmdit", model__joint_attention_dim=98))
    with pytest.raises(ConfigError, match="pos_embed_max_size 7 is less"):
        check_together(three("mmdit", model__pos_embed_max_size=7))  # 64 / 4 / 2 = 8 patches a side
    check_together(three("mmdit", model__pos_embed_max_size=8))
    with pytest.raises(ConfigError, match="multiple of 8; 64 is"):
        check_together(three("mmdit", data__resolution=68))


def test_the_perceptual_tower_is_checked():
    clip, autoencoder, _ = three(vae={"loss.perceptual": "clip:run/clip"})
    check_together([clip, autoencoder])
    other = made("autoencoder", output_dir="run/2", loss__perceptual="clip:run/vae")
    with pytest.raises(ConfigError, match=r"loss\.perceptual: run/vae is made by a autoencoder task"):
        check_together([clip, autoencoder, other])


def test_folders_on_disk_are_checked(tmp_path: Path):
    vae, text = tmp_path / "vae", tmp_path / "text"
    both = {"vae__pretrained": str(vae), "text__pretrained": str(text)}
    vae.mkdir()
    (text / "pipeline").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"vae\.pretrained: .*vae holds no finished model \(no config\.json\)"):
        check_together([made("unet", **both)])
    (vae / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [8] * 4}))
    with pytest.raises(ConfigError, match=r"text\.pretrained: .*text holds no finished model"):
        check_together([made("unet", **both)])
    # a run's exported folder comes before the run's own
    (text / "pipeline" / "config.json").write_text(
        json.dumps({"model_type": "clip", "text_config": {"hidden_size": 32}})
    )
    check_together([made("unet", **both)])
    with pytest.raises(ConfigError, match=r"resolution 80: .*factor-8 .*multiple of 32; 64 is"):
        check_together([made("unet", data__resolution=80, **both)])
    with pytest.raises(ConfigError, match=r"cross_attention_dim 16: .* gives 32"):
        check_together([made("unet", model__cross_attention_dim=16, **both)])
    (text / "pipeline" / "config.json").write_text(json.dumps({"model_type": "clip_text_model", "hidden_size": 16}))
    check_together([made("unet", model__cross_attention_dim=16, **both)])
    for file, key in ((vae / "config.json", "vae"), (text / "pipeline" / "config.json", "text")):
        kept = file.read_text()
        other = text / "pipeline" / "config.json" if key == "vae" else vae / "config.json"
        file.write_text(other.read_text())
        with pytest.raises(ConfigError, match=rf"{key}\.pretrained: .* of another kind of model"):
            check_together([made("unet", **both)])
        file.write_text("{")
        with pytest.raises(ConfigError, match=rf"{key}\.pretrained: .*config\.json.* not valid JSON"):
            check_together([made("unet", **both)])
        file.write_text(kept)


def test_a_bad_config_is_refused_without_torch_and_at_once():
    """The whole checking of the demo, and a refusal, in a fresh interpreter."""
    code = (
        "import sys, time; start = time.process_time()\n"
        "from training.config import load\n"
        "from training.fit import ConfigError, check_together\n"
        "trio = [load(f'configs/openmoji/{x}.yaml') for x in ('clip', 'vae', 'unet')]\n"
        "check_together(trio)\n"
        "try: load('configs/openmoji/unet.yaml', ['train.imagse=3'])\n"
        "except ConfigError as error: assert 'did you mean `images`' in str(error)\n"
        "else: raise SystemExit('accepted')\n"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "print(time.process_time() - start)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 5  # seconds of the processor: others may be busy beside


def test_relocate_moves_runs_and_what_points_to_them() -> None:
    trio = [load(ROOT / f"configs/openmoji/{name}.yaml") for name in ("clip", "vae", "unet")]
    perceptual = trio[1].model_copy(update={"loss": AutoencoderLoss(perceptual="clip:outputs/demo/clip")})
    clip, vae, unet = relocate([trio[0], perceptual, trio[2]], "elsewhere")
    assert [c.output_dir for c in (clip, vae, unet)] == ["elsewhere/clip", "elsewhere/vae", "elsewhere/unet"]
    assert isinstance(vae, AutoencoderConfig) and vae.loss.perceptual == "clip:elsewhere/clip"
    assert isinstance(unet, DiffusionConfig)
    assert (unet.vae.pretrained, unet.text.pretrained) == ("elsewhere/vae", "elsewhere/clip")
    assert unet.data == trio[2].data  # the data stay where they are
    check_together([clip, vae, unet])
    (alone,) = relocate([trio[2]], "elsewhere")  # what no config here makes keeps its place
    assert isinstance(alone, DiffusionConfig) and alone.vae.pretrained == "outputs/demo/vae"


def test_a_stage_that_is_trained_again_finds_the_earlier_ones(tmp_path: Path) -> None:
    unet = load(ROOT / "configs/openmoji/unet.yaml")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.yaml").touch()
    (alone,) = relocate([unet], tmp_path)
    assert isinstance(alone, DiffusionConfig) and alone.vae.pretrained == str(tmp_path / "vae")
    assert alone.text.pretrained == "outputs/demo/clip"  # which is not there


def test_an_override_for_one_of_several() -> None:
    texts, names = ["seed=1", "train.images=8", "unet.train.images=9", "vae.pretrained=x"], ["vae", "unet"]
    texts += ["vae.train.images=7"]
    assert overrides_of("unet", texts, names) == ["seed=1", "train.images=8", "train.images=9", "vae.pretrained=x"]
    assert overrides_of("vae", texts, names) == ["seed=1", "train.images=8", "vae.pretrained=x", "train.images=7"]
