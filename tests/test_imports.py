"""What may import what, and what an import may cost."""

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"ldm": {"ldm"}, "pipelines": {"ldm", "pipelines"}, "training": {"ldm", "pipelines", "training"}}
MATHS = sorted([*(ROOT / "ldm").glob("*.py"), *(ROOT / "ldm" / "sampling").glob("*.py")])  # all but the networks


def imported(source: str, module: str) -> set[str]:
    """Full names of all modules that a file imports, inside functions and under TYPE_CHECKING too.

    Args:
        source: text of the file.
        module: its dotted name; that of a package's ``__init__.py`` ends in ``.__init__``.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {x.name for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", BELOW)
def test_packages_import_downwards_only(package: str):
    assert sources(package)
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in sources(package)
        for name in imported(file.read_text(), dotted(file))
        if name.split(".")[0] in {*BELOW, "tests"} - BELOW[package]
    }
    assert not wrong


@pytest.mark.parametrize("package", BELOW)
def test_imports_are_relative_inside_a_package(package: str):
    absolute = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sources(package)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == package
    }
    assert not absolute


def test_there_is_mathematics_to_check():
    names = {"cond", "denoiser", "guidance", "paths", "prediction", "rng", "timesteps", "grids", "ode", "sde"}
    assert names <= {x.stem for x in MATHS}


@pytest.mark.parametrize("file", MATHS, ids=lambda x: str(x.relative_to(ROOT)))
def test_the_mathematics_knows_only_torch(file: Path):
    allowed = {"torch", "torchdiffeq", *sys.stdlib_module_names}  # the second for adaptive steps, where they are taken
    maths = {dotted(x).removesuffix(".__init__") for x in MATHS}
    if file == ROOT / "ldm" / "__init__.py":
        maths.add("ldm.models")  # a name that the face hands on, lazily
    wrong = {
        name
        for name in imported(file.read_text(), dotted(file))
        if name.split(".")[0] not in allowed and name not in maths
    }
    assert not wrong


def test_the_reader_of_imports_sees_every_form():
    """The tests above are worth what ``imported`` finds."""
    source = "import a.b\nfrom . import c\nfrom .d import e\ndef f():\n    from ..g import h\n    import training"
    assert imported(source, "ldm.models.x") == {"a.b", "ldm.models", "ldm.models.d", "ldm.g", "training"}
    assert imported("from .x import y", "ldm.__init__") == {"ldm.x"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


HEAVY = "{'torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'datasets', 'PIL', 'matplotlib'}"


@pytest.mark.parametrize("module", ["ldm", "ldm.models", "pipelines", "training", "training.config", "training.cli"])
def test_importing_costs_nothing_heavy(module: str):
    done = python(f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("package", ["ldm", "ldm.models", "pipelines"])
def test_lazy_names_are_all_there(package: str):
    """Each name of a face can be had, and the type checker is told of the same ones."""
    face = ROOT.joinpath(*package.split("."), "__init__.py")
    told = {
        x.asname or x.name
        for block in ast.parse(face.read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for x in node.names
    }
    module = __import__(package, fromlist=["x"])
    assert told and told <= set(dir(module))
    assert all(getattr(module, name) is not None for name in told)
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'Nothing'"):
        _ = module.Nothing


def test_help_is_quick_and_imports_nothing_heavy():
    """``ldm --help`` in under half a second."""
    code = "import sys; sys.argv = ['ldm', '--help']; from training.cli import main; main()"
    check = f"import atexit, sys; atexit.register(lambda: print('heavy:', sorted({HEAVY} & set(sys.modules)))); {code}"
    done = python(check)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout and done.stdout.endswith("heavy: []\n"), done.stdout

    def seconds() -> float:
        before = os.times()
        python(code)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    # The children's processor time: other tests run on the same cores, and waiting for them is not help's doing.
    assert statistics.median(seconds() for _ in range(5)) < 0.5
