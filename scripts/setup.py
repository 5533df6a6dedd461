"""Make .venv and install the package into it, everything pinned: ``make setup`` or ``python3 scripts/setup.py``.

Needs nothing but Python's standard library. torch comes first: its CPU build where no NVIDIA card is found, so that
gigabytes of CUDA libraries stay where they are; a torch that is there in the right version is kept. A second run sees
that nothing changed and returns at once, without the network. (The file is parsed by old Pythons too, so that they can
say what is wrong.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = [(3, 13), (3, 12), (3, 11)]
EXTRAS = "app,demo,dev"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(root: Path = ROOT) -> None:
    venv = root / ".venv"
    stamp = venv / "latent-t2i.stamp"
    if stamp.is_file() and (venv / "bin" / "python").exists() and stamp.read_text() == fingerprint(root):
        return
    check_python()
    make_venv(venv)
    stamp.unlink(missing_ok=True)
    install_torch(venv, pinned_torch(root), nvidia_card())
    say("installing the package and what it needs")
    pip(venv, "install", "-c", str(root / "constraints.txt"), "-e", f"{root}[{EXTRAS}]")
    stamp.write_text(fingerprint(root))
    say(f"ready, with torch {installed_torch(venv)}: see .venv/bin/ldm --help")


def fingerprint(root: Path) -> str:
    """Changes with whatever decides what is installed: the lists, this script, the Python of .venv, the place."""
    lists = [root / "pyproject.toml", root / "constraints.txt", Path(__file__), root / ".venv" / "pyvenv.cfg"]
    digest = hashlib.sha256(str(root).encode())
    for file in lists:
        digest.update(file.read_bytes() if file.is_file() else b"absent")
    return digest.hexdigest()


def check_python() -> None:
    """Go on only in a supported Python that can make environments; start again in another one where there is one."""
    have = sys.version_info[:2]
    if have not in SUPPORTED:
        others = (shutil.which(f"python{a}.{b}") for a, b in SUPPORTED)
        other = next((x for x in others if x), None)
        if other:
            say(f"Python {have[0]}.{have[1]} is not supported, going on with {other}")
            os.execv(other, [other, *sys.argv])
        names = ", ".join(f"{a}.{b}" for a, b in sorted(SUPPORTED))
        sys.exit(
            f"Python {have[0]}.{have[1]} ({sys.executable}) is not supported: {names} are. Install one of them "
            f"(Debian and Ubuntu: apt install python3.12 python3.12-venv) and run this again, or name it: "
            f"make setup PYTHON=/path/to/python3.12"
        )
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        sudo = "" if os.geteuid() == 0 else "sudo "
        sys.exit(
            f"Python {have[0]}.{have[1]} ({sys.executable}) lacks {' and '.join(missing)}, which make environments. "
            f"On Debian and Ubuntu: {sudo}apt install python{have[0]}.{have[1]}-venv; then run this again"
        )


def make_venv(venv: Path) -> None:
    """Make the environment, or mend it: no pip in it (an interrupted run), a Python that is gone (an upgrade)."""
    python = venv / "bin" / "python"
    version = output(python, "-c", "import sys; print(*sys.version_info[:2])")
    if version is None:
        again = venv.exists()
        say(f"making {venv.name} {'anew (its Python does not run)' if again else ''}".rstrip())
        run(sys.executable, "-m", "venv", *(["--clear"] if again else []), str(venv))
    elif tuple(map(int, version.split())) not in SUPPORTED:
        sys.exit(f"{venv} is of Python {version.strip().replace(' ', '.')}, which is not supported: remove it")
    if output(python, "-m", "pip", "--version") is None:
        run(str(python), "-m", "ensurepip", "--upgrade")


def install_torch(venv: Path, version: str, card: bool) -> None:
    have = installed_torch(venv)
    if have is not None and have.split("+")[0] == version:
        hint = f"; for the CUDA build remove {venv} first" if card and have.endswith("+cpu") else ""
        say(f"torch {have} is there and stays{hint}")
        return
    if card or sys.platform != "linux":
        say(f"installing torch {version}" + (" with CUDA" if card else ""))
        pip(venv, "install", "--no-deps", f"torch=={version}")
        return
    say(f"installing torch {version} for the CPU (no NVIDIA card found)")
    # The suffix keeps PyPI's CUDA build out. pip's own sources come first: a wheel folder or a mirror may have it,
    # and then torch's index need not be reached. `--no-deps`: the rest is resolved together, below.
    wanted = ["install", "--no-deps", f"torch=={version}+cpu"]
    if subprocess.run(pip_command(venv, *wanted), stderr=subprocess.DEVNULL).returncode:
        say(f"not in pip's own sources, asking {CPU_INDEX}")
        pip(
            venv, *wanted, "--index-url", CPU_INDEX, "--retries", "2", "--timeout", "15",
            hint=f"Install torch {version} by hand and run this again, it will be kept: "
            f"{venv / 'bin' / 'pip'} install torch=={version}",
        )  # fmt: skip


def pinned_torch(root: Path) -> str:
    found = re.search(r"^torch==(\S+)$", (root / "constraints.txt").read_text(), re.MULTILINE)
    if not found:
        sys.exit(f"{root / 'constraints.txt'} has no line torch==…")
    return found[1]


def installed_torch(venv: Path) -> str | None:
    found = output(venv / "bin" / "python", "-c", "from importlib.metadata import version; print(version('torch'))")
    return found and found.strip()


def nvidia_card() -> bool:
    """Whether the driver shows a card; torch, which would know, is not there yet."""
    listed = output("nvidia-smi", "-L")
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or (listed is not None and "GPU " in listed)


def pip_command(venv: Path, *args: str) -> list[str]:
    return [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *args]


def pip(venv: Path, *args: str, hint: str = "") -> None:
    run(*pip_command(venv, *args), hint=hint)


def run(*command: str, hint: str = "") -> None:
    sys.stdout.flush()
    code = subprocess.run(command).returncode
    if code:
        sys.exit(f"setup: this failed (exit code {code}): {' '.join(command)}" + (f"\n{hint}" if hint else ""))


def output(*command: str | Path) -> str | None:
    """What a command prints, or None where it fails or is not there."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    main()
