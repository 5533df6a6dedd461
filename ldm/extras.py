"""Optional packages: the pip command that installs one, with the versions that this package supports."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

DISTRIBUTION = "latent-t2i"


def pip_install(*packages: str) -> str:
    """``pip install 'gradio>=6.31,<7'``: the packages by name, as pyproject bounds them.

    An extra (``.[app]``) works in a clone alone, and the distribution may not be on an index.
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = []
    bounds: dict[str, str] = {}
    for line in lines:
        requirement = line.partition(";")[0].replace(" ", "")
        end = next((i for i, x in enumerate(requirement) if x in "<>=!~["), len(requirement))
        name, bound = requirement[:end], requirement[end:].partition("]")[2] or requirement[end:]
        bounds.setdefault(name.lower().replace("_", "-"), ",".join(sorted(bound.split(","), reverse=True)))
    wanted = [name + bounds.get(name.lower().replace("_", "-"), "") for name in packages]
    return "pip install " + " ".join(f"'{x}'" if set(x) & set("<>=!~[") else x for x in wanted)


def require(purpose: str, **modules: str) -> None:
    """Raise a ValueError of one line where a module is missing.

    Args:
        purpose: subject of the message: what needs the packages.
        modules: name of the module = name of its package.
    """
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"{purpose}: missing {', '.join(missing)}; {pip_install(*missing)}")
