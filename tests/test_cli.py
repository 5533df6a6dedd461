"""The command line: what it prints, what it writes, and that bad input is one message and nothing touched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from training import cli
from training.config import load
from training.fit import check_together
from training.shipped import config_files

ROOT = Path(__file__).resolve().parent.parent


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def ldm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run the command line in this process. An exception that is not a message fails the test with its traceback."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["ldm", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        said = Said(code, *capsys.readouterr())
        assert "Traceback" not in said.out + said.err
        return said

    return run


def refused(said: Said, *words: str) -> None:
    assert said.code == 2, said
    assert said.err.startswith("ldm: ") and said.err.count("ldm: ") == 1, said.err
    for word in words:
        assert word in said.err, (word, said.err)


def write_pictures(root: Path, captions: list[str], column: str = "text") -> Path:
    """An imagefolder with a train and a test split of one-coloured pictures."""
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        lines = []
        for i, caption in enumerate(captions):
            Image.new("RGB", (16, 16), (40 * i, 90, 200)).save(root / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", column: caption}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def files_under(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


CAPTIONS = ["a red apple", "a green apple", "a dog's face", "zebra"]
TRAIN = {"images": 8, "batch_size": 4, "mixed_precision": "no"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data and the configs of three small stages."""
    data = {"path": str(write_pictures(tmp_path / "data", CAPTIONS)), "resolution": 16}
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    stages: dict[str, dict[str, Any]] = {
        "clip": {
            "task": "clip",
            "model": {
                "text": tower,
                "vision": tower | {"patch_size": 8},
                "projection_dim": 12,
                "tokenizer": {"vocab_size": 560, "max_length": 12},
            },
        },
        "vae": {"task": "autoencoder", "model": {"block_out_channels": [8, 8], "norm_num_groups": 4}},
        "unet": {
            "task": "diffusion",
            "model": {"name": "unet", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
            "vae": {"pretrained": str(tmp_path / "runs/vae")},
            "text": {"pretrained": str(tmp_path / "runs/clip")},
        },
    }
    stages["mmdit"] = stages["unet"] | {
        "model": {"name": "mmdit", "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    }
    for name, stage in stages.items():
        whole = {**stage, "output_dir": str(tmp_path / "runs" / name), "data": data, "train": TRAIN}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return tmp_path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ldm.paths import RectifiedFlow
    from ldm.prediction import Flow
    from pipelines.core import Parts
    from pipelines.folder import save_parts
    from pipelines.schedulers import default_schedule
    from tests import tiny

    folder = tmp_path_factory.mktemp("made") / "pipeline"
    schedule = default_schedule(RectifiedFlow(), Flow(), "sd", 1.0)
    save_parts(folder, Parts(tiny.unet(), tiny.vae(), tiny.text("sd"), schedule))
    return folder


# --- without torch ---------------------------------------------------------------------------------------------------


def without_torch(*arguments: str) -> subprocess.CompletedProcess:
    """Run ``ldm`` in a new interpreter, which fails if torch was imported."""
    script = (
        "import sys\n"
        "from training.cli import main\n"
        f"sys.argv = ['ldm', *{list(arguments)!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as leaving:\n    code = leaving.code\n"
        "else:\n    code = 0\n"
        "loaded = [m for m in ('torch', 'diffusers', 'transformers', 'datasets') if m in sys.modules]\n"
        "sys.exit(f'imported {loaded}' if loaded else code)"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_lists_the_commands_without_torch() -> None:
    done = without_torch("--help")
    assert done.returncode == 0, done.stderr
    for command in ("data", "train", "check", "sample", "evaluate", "inspect", "init"):
        assert re.search(rf"^\W*{command}\s", done.stdout, re.MULTILINE), command


def test_a_wrong_key_is_refused_without_torch(place: Path) -> None:
    done = without_torch("train", str(place / "clip.yaml"), "train.imags=7")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "clip.yaml" in done.stderr and "train.imags" in done.stderr and "did you mean `images`" in done.stderr
    assert not (place / "runs").exists()


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.images=many", ("clip.yaml", "train.images", "'many'")),
        ("data.resolution=20", ("clip.yaml", "data.resolution 20", "patch_size")),
        ("task=clop", ("clip.yaml", "task", "did you mean `clip`")),
        ("train.batch_size=0", ("clip.yaml", "train.batch_size")),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_key(
    ldm: Callable[..., Said], place: Path, command: str, override: str, words: tuple[str, ...]
) -> None:
    refused(ldm(command, place / "clip.yaml", override), *words)
    assert not (place / "runs").exists()


def test_configs_that_cannot_be_read(ldm: Callable[..., Said], place: Path) -> None:
    refused(ldm("train", place / "no.yaml"), "no.yaml", "no such config file")
    refused(ldm("train", "seed=1"), "no config file given")
    (place / "odd.yaml").write_text("task: [clip\n")
    refused(ldm("train", place / "odd.yaml"), "odd.yaml", "not valid YAML")
    refused(ldm("train", place / "unet.yaml"), "vae.pretrained", "no earlier config makes it")
    refused(ldm("train", place / "clip.yaml", place / "clip.yaml"), "output_dir of two configs")


def test_the_shipped_configs_are_whole_and_fit_together() -> None:
    ours = {name: file for name, file in config_files().items() if file.suffix == ".yaml"}
    made = {name: load(file) for name, file in ours.items() if not name.startswith("accelerate/")}
    parts = [f"openmoji/{n}" for n in ("clip", "vae", "unet", "mmdit", "dit")]
    adapting = {f"openmoji/{n}" for n in ("lora", "dreambooth", "textual_inversion")}
    adapting |= {"sd15_finetune", "sd15_lora", "sdxl_lora", "sd3_lora", "pixart_lora"}
    adapting |= {"dreambooth", "textual_inversion", "inpaint"}
    scratch = {"vae_f8", "unet_sd2_from_scratch", "dit_xl_from_scratch", "mmdit_from_scratch"}
    assert {*parts, *adapting, *scratch} == made.keys()
    check_together([made[name] for name in parts])


# --- data ------------------------------------------------------------------------------------------------------------


def test_bad_data_is_refused_before_any_stage(ldm: Callable[..., Said], place: Path) -> None:
    both = (place / "clip.yaml", place / "vae.yaml")
    refused(ldm("train", *both, f"data.path={place / 'gone'}"), str(place / "gone"), "no such folder")
    (place / "empty").mkdir()
    refused(ldm("train", *both, f"data.path={place / 'empty'}"), str(place / "empty"), "empty")
    refused(ldm("train", *both, "data.caption_column=label"), "no column 'label'", "caption_column", "text")
    refused(ldm("train", *both, "data.image_column=photo"), "no column 'photo'", "image_column")
    refused(ldm("train", *both, "data.image_column=text"), "'text' (image_column) holds no pictures")
    assert not (place / "runs").exists()


def test_a_picture_that_does_not_decode_is_named(ldm: Callable[..., Said], place: Path) -> None:
    broken = place / "data/train/2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    for command in ("train", "check"):
        refused(ldm(command, place / "clip.yaml"), "train/2.png", "does not decode", "1 of 4")
    assert not (place / "runs").exists()
    assert len(broken.read_bytes()) == 40  # nothing of the user's is deleted


def test_an_output_folder_of_another_kind_is_refused_and_untouched(ldm: Callable[..., Said], place: Path) -> None:
    other = place / "runs/clip"
    other.mkdir(parents=True)
    (other / "letter.txt").write_text("dear diary")
    before = files_under(place)
    refused(ldm("train", place / "clip.yaml"), str(other), "holds no run", "another output_dir")
    (other / "letter.txt").unlink()
    other.rmdir()
    other.write_text("a file")
    refused(ldm("train", place / "clip.yaml"), str(other), "is a file, and a folder is needed")
    other.unlink()
    other.mkdir()
    (other / "letter.txt").write_text("dear diary")
    assert files_under(place) == before


def test_an_output_folder_of_another_run_is_refused_by_key(ldm: Callable[..., Said], place: Path) -> None:
    run = place / "runs/clip"
    run.mkdir(parents=True)
    from training.config import dump

    (run / "config.yaml").write_text(dump(load(place / "clip.yaml", ["seed=4"])))
    (run / "done.json").write_text("{}")  # before a checkpoint or the end no config binds
    before = files_under(place)
    refused(ldm("train", place / "clip.yaml"), str(run), "seed: 4 there, 0 here")
    assert files_under(place) == before


# --- check, inspect, init --------------------------------------------------------------------------------------------


def test_check_tells_sizes_and_time_and_trains_nothing(ldm: Callable[..., Said], place: Path) -> None:
    said = ldm("check", *(place / f"{n}.yaml" for n in ("clip", "vae", "unet", "mmdit")))
    assert said.code == 0, said
    assert "4 to train on, 4 held out, 16 px" in said.out and "8 images, 2 steps, 2.0 epochs" in said.out
    assert len(re.findall(r"parameters\W+\d+\.\d\dM", said.out)) == 4
    for row in ("time", "a step", "memory of a step", "memory, measured", "device"):
        assert len(re.findall(rf"^\W*{row}\W", said.out, re.MULTILINE)) == 4, row
    assert said.out.count("cache on disk") == 2
    assert not (place / "runs").exists()


def test_what_does_not_fit_is_not_begun(ldm: Callable[..., Said], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list nothing, though one of them would fit; --no-check trains all the same."""
    both = (place / "clip.yaml", place / "vae.yaml")
    before = files_under(place)
    from training import preflight
    from training.rehearsal import Rehearsal

    monkeypatch.setattr(preflight, "rehearse", lambda *a, **k: Rehearsal(1.0, 1.0, 0))
    sizes = {c: re.search(r"step takes ([\d.]+) MiB", ldm_with(1000, ldm, monkeypatch, "check", c).err) for c in both}
    takes = [float(found[1]) * 2**20 for found in sizes.values() if found]
    assert len(takes) == 2 and takes[0] != takes[1]
    small, large = sorted(zip(takes, both, strict=True))
    between = int((small[0] + large[0]) / 2 / preflight.ROOM)
    for command in ("train", "check"):
        said = ldm_with(between, ldm, monkeypatch, command, *both)
        refused(said, f"runs/{large[1].stem}: does not fit: a step takes", "would", "nothing is begun", "--no-check")
        assert f"runs/{small[1].stem}: does not fit" not in said.err
        assert f"runs/{small[1].stem}: " in said.out and "does not fit" in said.out  # the tables of both
    assert files_under(place) == before and not (place / "runs").exists()
    assert ldm_with(1000, ldm, monkeypatch, "train", "--no-check", both[0]).code == 0
    assert (place / "runs/clip/done.json").is_file()


def ldm_with(free: int, ldm: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Said:
    """The command with so many bytes free."""
    from training import measure

    monkeypatch.setattr(measure, "free_memory", lambda device: free)
    return ldm(*arguments)


def test_inspect_data(ldm: Callable[..., Said], place: Path, tmp_path: Path) -> None:
    for source in (place / "data", place / "unet.yaml"):
        page = tmp_path / f"{source.stem}.html"
        said = ldm("inspect", "data", source, "-o", page)
        assert said.code == 0 and said.out.splitlines()[-1] == str(page), said
        assert "train: " in said.out and "captions: " in said.out and "bucket" in said.out
        assert "a red apple" in page.read_text() and page.read_text().count("data:image") >= 1
    refused(ldm("inspect", "data", place / "gone"), "no such folder")
    refused(ldm("inspect", "data", place / "unet.yaml", "data.path=gone"), "gone: no such folder")
    refused(ldm("inspect", "data", place / "data", "data.resolution=8"), "only a config takes overrides")


def test_inspect_path(ldm: Callable[..., Said], place: Path, tmp_path: Path) -> None:
    config, picture = place / "unet.yaml", tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    sheets = []
    for name in ("rectified_flow", "discrete", "ve"):
        out = tmp_path / name / "path.png"
        assert str(out) in ldm("inspect", "path", config, f"path.name={name}", "--picture", picture, "-o", out).out
        with Image.open(out) as drawn:
            sheets.append(np.asarray(drawn.convert("RGB")))
    assert sheets[0].shape == sheets[1].shape and (sheets[0] != sheets[1]).mean() > 0.02
    # the first small picture is the red one, the last is noise
    height, width = sheets[0].shape[:2]
    row = sheets[0][int(height * 0.8)]
    assert row[width // 10].tolist() == [255, 0, 0] and row[-width // 5 : -width // 20].std() > 40
    refused(ldm("inspect", "path", place / "clip.yaml"), "a clip task has no path")
    refused(ldm("inspect", "path", config, place / "clip.yaml"), "expected one config file")
    refused(ldm("inspect", "path", config, "--picture", place / "gone.png"), "no such picture file")
    refused(ldm("inspect", "path", config, "-o", tmp_path / "path.xyz"), "name of a picture file")


def test_inspect_model(ldm: Callable[..., Said], pipeline: Path, place: Path) -> None:
    said = ldm("inspect", "model", pipeline)
    assert said.code == 0, said
    for word in ("UNet", "VAE", "RectifiedFlow", "Flow", "16x16", "4 channels", "scale 0.7"):
        assert word in said.out, word
    refused(ldm("inspect", "model", place / "data"), "model_index.json", "no pipeline folder")


def test_init_lists_copies_and_overwrites_nothing(
    ldm: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listing = ldm("init").out.split()
    assert {"openmoji/clip", "openmoji/vae", "openmoji/unet", "openmoji/mmdit", "openmoji/concepts.txt"} <= set(listing)
    assert ldm("init", "openmoji/unet").out.strip() == "unet.yaml"
    assert (tmp_path / "unet.yaml").read_bytes() == (ROOT / "configs/openmoji/unet.yaml").read_bytes()
    (tmp_path / "unet.yaml").write_text("mine")
    refused(ldm("init", "openmoji/unet"), "unet.yaml", "is there already")
    assert (tmp_path / "unet.yaml").read_text() == "mine"
    assert ldm("init", "openmoji/unet.yaml", "--out", "new/other.yaml").code == 0
    assert load(tmp_path / "new/other.yaml").task == "diffusion"
    refused(ldm("init", "openmoji/nothing"), "openmoji/nothing", "openmoji/vae")
