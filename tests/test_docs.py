"""What the README and the documents show runs as it stands there: commands in their order, with small networks and few
pictures; snippets of Python; and every key and YAML fragment is one that a config may have."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import BaseModel

from tests import adapting, shapes
from training import config as reading
from training import preflight
from training.cli import main
from training.evaluate import evaluation
from training.schema import AdaptConfig, AutoencoderConfig, ClipConfig, DiffusionConfig

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SHELL = ("bash", "sh")

# What is not run here, and the test that runs it.
ELSEWHERE = {
    r"make demo$": "test_demo.py",
    r"make test(-slow|-browser)?$": "test_setup.py",
    r"(python3 -m venv|pip install|apt-get install) ": "test_setup.py",
    r"([A-Z_]+=\w+ )*(torchrun|accelerate launch) .*deepspeed": "test_zero.py",
    r"([A-Z_]+=\w+ )*(torchrun --nnodes|accelerate launch .*--num_machines) ": "test_processes_nodes.py",
    r"sbatch ": "test_slurm.py",
    r"ACCELERATE_USE_DEEPSPEED=true ": "test_zero.py",
    r"(ACCELERATE_USE_CPU=true )?(torchrun|accelerate launch) ": "test_processes_launch.py",
    r"python benchmarks/": "test_benchmarks.py",
    r"ldm app ": "test_app_browser.py",
    r"ldm judge ": "test_adapted.py",
}
# What a command is given beside what it says, to be short.
SHORT = {
    "sample": ["--steps", "2"],
    "train": ["--no-check"],
    "evaluate": ["--steps", "2", "--samples", "6"],
}


# --- a small world -------------------------------------------------------------------------------------------------


def photos(folder: Path, side: int, count: int = 8) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(("a lighthouse at dusk", "sks dog", "a red box")[i % 3])


def concepts(folder: Path, split: str) -> None:
    """As `ldm data` writes them."""
    (folder / split).mkdir(parents=True)
    rows = []
    for i, colour in enumerate(("red", "green", "blue", "yellow", "black", "orange", "white", "grey")):
        Image.new("RGB", (32, 32), colour).save(folder / split / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"a {colour} box", "concept": f"{colour} box"}))
    (folder / split / "metadata.jsonl").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents speak of: the demo's pipeline and data, a folder of photos, a LoRA of them."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(adapting.base("sd", root), root / "outputs/demo/pipeline")
    photos(root / "photos", 32)
    for data in ("concepts", "style"):
        for split in ("train", "test"):
            concepts(root / "outputs/demo/data" / data, split)
    tokens = {"new_tokens": [{"token": "<toy>"}], "data": {"instance_prompt": "a <toy>"}}
    run = adapting.trained("sd", root, "outputs/made", lora={"rank": 2}, **tokens)
    assert (run / "adapter").is_dir()
    shutil.copytree(ROOT / "configs", root / "configs")
    return root


def small(raw: dict[str, Any]) -> dict[str, Any]:
    """The same config at a size for tests."""
    train = {
        "images": 4, "batch_size": 2, "gradient_accumulation_steps": 1, "log_every": 2, "num_workers": 0,
        "mixed_precision": "no", "report_to": "none", "checkpoint_every": 10**6, "sample_every": 10**6,
        "validate_every": 10**6,
    }  # fmt: skip
    data = {**raw["data"], "resolution": 32}
    models = {"clip": shapes.CLIP["model"], "autoencoder": shapes.VAE_["model"], "diffusion": shapes.UNET["model"]}
    changed = {**raw, "train": {**raw["train"], **train}, "data": data}
    if raw["task"] in models:
        changed["model"] = models[raw["task"]]
    if raw.get("lora"):
        changed["lora"] = {**raw["lora"], "rank": 2}
    if raw.get("prior"):
        changed["prior"] = {**raw["prior"], "num_class_images": 2, "num_inference_steps": 2}
    if raw.get("sample"):
        changed["sample"] = {**raw["sample"], "num_inference_steps": 2}
    return changed


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, as the working directory; configs are read as small ones."""
    root = tmp_path / "world"
    shutil.copytree(world, root)
    monkeypatch.setattr(evaluation, "_cache", lambda: root / "features")
    parse = reading.parse
    monkeypatch.setattr(
        reading, "parse", lambda raw, where: parse(small(raw), where) if "train" in raw else parse(raw, where)
    )
    monkeypatch.chdir(root)
    return root


# --- commands and snippets -----------------------------------------------------------------------------------------


def commands(block: str) -> list[str]:
    """Its lines without comments; what ends in a backslash goes on."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command.removeprefix(".venv/bin/"))
    assert words[0] == "ldm", f"{command}: neither of `ldm` nor among ELSEWHERE"
    if words[1] == "adapt" and "--yes" not in words:
        words.append("--yes")
    monkeypatch.setattr(sys, "argv", words + SHORT.get(words[1], []))
    try:
        main()
    except SystemExit as end:
        assert not end.code, f"{command}: exit code {end.code}"


def elsewhere(command: str) -> bool:
    found = [test for pattern, test in ELSEWHERE.items() if re.match(pattern, command.removeprefix(".venv/bin/"))]
    assert all((ROOT / "tests" / test).is_file() for test in found), found
    return bool(found)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_snippets_run(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, Python in one namespace; a line that fails is named by its own number."""
    if name != "docs/from-scratch.md":  # once is enough
        monkeypatch.setattr(preflight, "report", lambda configs, **kw: [])
    text = (ROOT / name).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE)), "a block without a language"
    space: dict[str, Any] = {"torch": torch}
    names = {"RUN": "outputs/made", "BASE": "outputs/demo/pipeline"}
    for block in found:
        before = text[: block.start(2)].count("\n")
        if block[1] in SHELL:
            for command in commands(block[2]):
                if not elsewhere(command):
                    run(command, monkeypatch)
        elif block[1] == "python":
            code = re.sub(r'"(RUN|BASE)(?=["/])', lambda m: f'"{names[m[1]]}', block[2])
            exec(compile("\n" * before + code, str(ROOT / name), "exec"), space)


# --- keys and fragments --------------------------------------------------------------------------------------------


def sections(kind: Any) -> list[type[BaseModel]]:
    """The models in an annotation, through unions, tuples and options."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [found for part in get_args(kind) for found in sections(part)]


def known(key: str) -> bool:
    """Is ``a.b`` a key of some config?"""
    kinds: list[type[BaseModel]] = [AdaptConfig, DiffusionConfig, AutoencoderConfig, ClipConfig]
    for part in key.split("."):
        fields = [kind.model_fields[part] for kind in kinds if part in kind.model_fields]
        if not fields:
            return False
        kinds = [found for field in fields for found in sections(field.annotation)]
    return True


def dotted(raw: Any, above: str = "") -> list[str]:
    if isinstance(raw, dict):
        return [key for name, value in raw.items() for key in dotted(value, f"{above}.{name}".strip("."))]
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        return [key for entry in raw for key in dotted(entry, above)]
    return [above]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_yaml_has_keys_that_a_config_has(name: str) -> None:
    for language, text in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
        if language == "yaml":
            raw = yaml.load(text, Loader=reading._Loader)
            if "task" in raw:
                reading.parse(raw, name)
            assert [key for key in dotted(raw) if not known(key)] == []


def test_the_table_of_names_has_keys_that_a_config_has() -> None:
    rows = [line.split("|") for line in (ROOT / "docs/moving.md").read_text(encoding="utf-8").splitlines()]
    keys = [re.findall(r"`([a-z_.]+)`", row[-2])[:1] for row in rows if len(row) == 6]
    found = [key for first in keys for key in first]
    assert len(found) > 40 and [key for key in found if not known(key)] == []


def test_links_lead_somewhere() -> None:
    for name in DOCUMENTS:
        text = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"


def test_the_theory_is_held_by_comparisons() -> None:
    text = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    assert text.count("```python") >= 10 and text.count("same(") >= 25
