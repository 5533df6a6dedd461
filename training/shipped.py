"""The configs that come with the package."""

from __future__ import annotations

from pathlib import Path


def config_files() -> dict[str, Path]:
    """The shipped configs and concept lists by name: ``openmoji/unet`` for ``configs/openmoji/unet.yaml``.

    A file that is no YAML keeps its ending: ``openmoji/concepts.txt``. In a wheel they lie inside this package,
    in a checkout (and in an editable install) in the folder ``configs`` beside it.
    """
    here = Path(__file__).resolve().parent
    root = next((x for x in (here / "configs", here.parent / "configs") if x.is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"no configs in {here / 'configs'} nor beside {here}: install the package anew")
    files = (x for x in sorted(root.rglob("*")) if x.suffix in {".yaml", ".txt", ".sh"})
    return {x.relative_to(root).as_posix().removesuffix(".yaml"): x for x in files}
