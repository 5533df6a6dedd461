"""Compiles ``guard.cpp`` once for each torch and source, and loads it. Imports no torch: it must come first."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
FOLDER = SOURCE.parent / "build"  # which git ignores


class CannotBuild(RuntimeError):
    """There is no compiler, no header of torch's, or the compiler fails; the message says which."""


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild("torch is not installed")
    return Path(spec.submodule_search_locations[0])


def library() -> Path:
    """The shared library, compiled if it is not there. Several processes may ask at once.

    Raises:
        CannotBuild: and why.
    """
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(SOURCE.read_bytes() + f"{version} {torch_folder()}".encode()).hexdigest()[:16]
    file = FOLDER / f"guard-{digest}.so"
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            _compile(file)
    return file


def _compile(file: Path) -> None:
    if sys.platform != "linux":
        raise CannotBuild(f"the device guard is compiled on Linux only, this is {sys.platform}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise CannotBuild("no C++ compiler (g++, c++ or clang++) on the PATH: apt install g++")
    root = torch_folder()
    if not (root / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").is_file():
        raise CannotBuild(f"{root}/include has no headers of torch's")
    partial = file.with_suffix(".partial")
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
    command = [*compiler.split(), "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(partial), *libraries], capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{compiler} cannot compile guard.cpp against torch's headers: {done.stderr[:2000]}")
    partial.replace(file)


def load() -> None:
    """Raises CannotBuild, or RuntimeError where torch is imported already: it asks for the device once, at import."""
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device must be loaded before torch is imported")
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
