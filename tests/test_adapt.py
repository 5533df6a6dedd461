"""A finished pipeline is trained on: what it says of itself holds, all of it learns, and stock diffusers opens it."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ldm.paths import DiscreteVP
from tests import adapting, families
from tests.adapting import base, config, drawn, stock, trained
from training import base as base_module
from training.base import base_of, times_of
from training.fit import ConfigError, check_together
from training.run import build, open_data
from training.sizes import sizes

FAMILIES = ["sd", "sdxl", "sd3", "sd3 without t5", "pixart alpha"]
NETS = {
    "sd": "unet",
    "sdxl": "unet",
    "sd3": "transformer",
    "sd3 without t5": "transformer",
    "pixart alpha": "transformer",
}


spied = pytest.fixture(adapting.spied)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapt")


def _weights(pipe: DiffusionPipeline, name: str) -> dict[str, torch.Tensor]:
    return getattr(pipe, name).state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_denoiser_learns_and_the_trainers_picture_is_the_users(family: str, root: Path, spied: dict) -> None:
    """The rest stays as it is; the grid of the last step is what stock draws from the same seeds."""
    before, run = stock(family), trained(family, root, f"whole_{family[:9]}", train={"sample_every": 6}, ema_decay=0.5)
    after = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert type(after) is type(before)
    pairs = zip(_weights(before, NETS[family]).items(), _weights(after, NETS[family]).values(), strict=True)
    assert {name for (name, old), new in pairs if torch.equal(old, new)} <= {"pos_embed.pos_embed"}  # a buffer
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(before, name, None) is not None:
            assert all(torch.equal(old, _weights(after, name)[k]) for k, old in _weights(before, name).items()), name
    assert json.loads((run / "done.json").read_text())["inputs"].keys() == {"base", "data"}

    assert (run / "samples" / "images_000000006.png").is_file()
    more = {"use_resolution_binning": False} if family == "pixart alpha" else {}
    after.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(after, spied["prompts"], **more), spied["pictures"], atol=1e-4, rtol=0)
    assert not torch.allclose(drawn(before, spied["prompts"], **more), spied["pictures"], atol=1e-3)


@pytest.mark.parametrize("trains", [{}, {"train_denoiser": False, "train_text_encoder": True}])
def test_what_was_frozen_in_half_precision_is_exported_as_the_base_has_it(trains: dict, root: Path) -> None:
    """Stock opens each part in its stored dtype, and cannot call a float32 network with bf16 text."""
    run = trained("sd3", root, f"frozen_{len(trains)}", base_dtype="bf16", train={"mixed_precision": "bf16"}, **trains)
    before, after = stock("sd3"), DiffusionPipeline.from_pretrained(run / "pipeline")
    for name in ["text_encoder", "text_encoder_2"] if not trains else ["transformer"]:
        for key, value in _weights(before, name).items():
            assert torch.equal(_weights(after, name)[key], value), (name, key)
    assert drawn(families.quiet(after), ["a red box"]).isfinite().all()


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart alpha"])
def test_text_encoders_learn_too(family: str, root: Path) -> None:
    run = trained(family, root, f"text_{family[:9]}", train_text_encoder=True)
    before, after = stock(family), DiffusionPipeline.from_pretrained(run / "pipeline")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(before, name, None) is None:
            continue
        old, new = _weights(before, name), _weights(after, name)
        still = {key for key, x in old.items() if x.equal(new[key])}
        if name == "text_encoder_3":
            assert still == set(old)  # nobody trains SD3's T5
        elif (family, name) == ("sdxl", "text_encoder"):  # the layer before its last is read, and nothing after it
            last = f"layers.{before.text_encoder.config.num_hidden_layers - 1}."
            assert still == {key for key in old if last in key or "final_layer_norm" in key}
        else:
            assert not still


def test_a_half_way_checkpoint_holds_what_trains_and_goes_on_exactly(root: Path) -> None:
    how = {"train": {"images": 12, "checkpoint_every": 6, "keep_last": 5}, "train_text_encoder": True}
    straight = trained("sd", root, "straight", **how)
    again = config("sd", root, "again", **how)
    shutil.copytree(straight, again.output_dir)
    for late in ("checkpoints/images_000000012", "pipeline", "samples", "report.html"):
        shutil.rmtree(Path(again.output_dir) / late, ignore_errors=True)
    (Path(again.output_dir) / "done.json").unlink()
    text = (Path(again.output_dir) / "config.yaml").read_text().replace(str(straight), again.output_dir)
    (Path(again.output_dir) / "config.yaml").write_text(text)
    from training.run import train_all

    train_all([again])
    for file in ("net", "net_optimizer", "rng"):
        one, two = (load_file(run / f"checkpoints/images_000000012/{file}.safetensors") for run in
                    (straight, Path(again.output_dir)))  # fmt: skip
        assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one), file
    held = load_file(straight / "checkpoints/images_000000012/net.safetensors")
    assert any(k.startswith("net.") for k in held) and any(k.startswith("text.") for k in held)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_told_without_weights(family: str, root: Path, accelerator) -> None:
    made = config(family, root, f"sizes_{family[:9]}")
    rows = open_data(made)
    task = build(made, *rows, Path(made.output_dir), accelerator)
    cond = task.encoders.text.encode(["a box"])
    told = sizes(made)
    assert (told.text_length, told.text_width) == tuple(cond.tokens.shape[1:])
    assert told.pooled_width == (None if cond.pooled is None else cond.pooled.shape[-1])
    assert (told.factor, told.latent_channels) == (task.about.factor, task.about.channels)


@pytest.fixture
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


# --- what the base says of itself ------------------------------------------------------------------------------------


def test_path_prediction_and_times_are_the_bases(root: Path) -> None:
    chain, flow = config("sd", root, "x"), config("sd3", root, "x")
    schedule = base_of(chain).schedule
    assert schedule.path == DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert times_of(chain, schedule).name == "uniform"
    times = times_of(flow, base_of(flow).schedule)
    assert (times.name, times.shift) == ("logit_normal", 3.0)
    same = {"path": {"name": "discrete"}, "prediction_type": "epsilon"}
    assert base_of(config("sd", root, "x", **same)).schedule == schedule


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction: the base .* predicts epsilon"),
        ({"path": {"name": "rectified_flow"}}, "path rectified_flow: the base .* was trained on DiscreteVP"),
        ({"path": {"name": "discrete", "beta_end": 0.02}}, "path discrete: the base"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: needs a base .* that predicts v"),
        ({"data": {"resolution": 18}}, "data.resolution 18: the base needs a multiple of 4; 16 is"),
        ({"base": "nowhere/at/all"}, "base: nowhere/at/all: no such folder"),
        ({"base_config": "folder"}, "base_config is of a single file"),
        ({"train_denoiser": False}, "nothing would train"),
        ({"train_denoiser": False, "lora": {}}, "nothing would train"),
        ({"train_text_encoder": True, "cache": {"text": True}}, "cache.text: the text encoders train"),
        ({"lora": {}, "conditioning": {"name": "inpaint"}}, "conditioning trains the whole denoiser"),
        ({"new_tokens": [{"token": "<a>"}, {"token": "<a>"}]}, "new_tokens: <a> twice"),
        ({"loar": {}}, "unknown key `loar`; did you mean `lora`"),
        ({"lora": {"rnak": 4}}, "unknown key `lora.rnak`; did you mean `rank`"),
        ({"lora": {"target_modules": ["("]}}, "no regular expression"),
    ],
)
def test_what_contradicts_is_refused(sections: dict, said: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        check_together([config("sd", root, "refused", **sections)])


def test_a_base_that_is_no_pipeline(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no model_index\.json"):
        check_together([config("sd", root, "refused", base=str(tmp_path / "empty"))])
    folder = shutil.copytree(base("sd", root), tmp_path / "foreign")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ConfigError, match="_class_name is 'KandinskyPipeline'"):
        check_together([config("sd", root, "refused", base=str(folder))])
    shutil.rmtree(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"vae/config\.json: missing"):
        check_together([config("sd", root, "refused", base=str(folder))])


def test_zero_terminal_snr_is_taught(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base("sd", root), tmp_path / "v")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    run = trained("sd", root, "zero_snr", base=str(folder), rescale_betas_zero_snr=True)
    after = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert after.scheduler.config.rescale_betas_zero_snr and after.scheduler.config.timestep_spacing == "trailing"
    assert after.scheduler.alphas_cumprod[-1] < 1e-7


def test_a_single_file_is_a_base(root: Path, tmp_path: Path) -> None:
    """Turned into a folder once; a run from it is that from the folder, to the bit."""
    from pipelines.convert import convert
    from tests import test_convert

    folder, file = tmp_path / "folder", tmp_path / "single.safetensors"
    test_convert.pipeline("sd15").save_pretrained(folder)
    convert(folder, file)
    how = {"data": {"resolution": 32}, "base_config": None, "train": {"images": 2}}
    one = trained("sd", root, "from_folder", base=str(folder), **how)
    two = trained("sd", root, "from_file", base=str(file), **{**how, "base_config": str(folder)})
    a, b = (load_file(run / "pipeline/unet/diffusion_pytorch_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    stamp = (two / "base.json").read_text()
    base_of(config("sd", root, "from_file", base=str(file), **{**how, "base_config": str(folder)}))
    assert (two / "base.json").read_text() == stamp


def test_processes_that_start_together_turn_a_single_file_into_a_folder_once(tmp_path: Path, monkeypatch) -> None:
    file, calls = tmp_path / "single.safetensors", []
    file.write_bytes(b"weights")

    def convert(source: Path, target: Path, **options) -> None:
        calls.append(source)
        target.mkdir()
        time.sleep(0.3)
        (target / base_module.INDEX).write_text("{}")

    monkeypatch.setattr("pipelines.convert.convert", convert)
    made = SimpleNamespace(output_dir=str(tmp_path / "run"), base_config=None)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: base_module._converted(made, file), range(2)))
    assert calls == [file] and folders == [tmp_path / "run" / "base"] * 2
    assert (folders[0] / base_module.INDEX).is_file()


def test_an_encoder_that_does_not_train_keeps_still(root: Path, accelerator) -> None:
    """SD3's T5, which has dropout, beside two CLIPs that learn."""
    made = config("sd3", root, "still", train_text_encoder=True)
    task = build(made, *open_data(made), Path(made.output_dir), accelerator)
    for _ in range(2):
        assert [tower.training for _, tower in task.text.towers().values()] == [True, True, False]
        task.held_out()  # at rest, and back
