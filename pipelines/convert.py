"""A pipeline folder into one CompVis-style safetensors file, and back.

The file is what A1111, ComfyUI and CompVis's own code read: Stable Diffusion 1.5, 2.1, XL and 3 (3.5). ``key_maps.py``
has the names, ``convert_configs.py`` the layouts; here they are walked, a tensor at a time. Both ends are checked
against the stock classes on the meta device: every name and shape that these have is there, and nothing else.
"""

from __future__ import annotations

from pathlib import Path

from .convert_configs import LAYOUTS
from .convert_in import to_folder
from .convert_out import to_file
from .outputs import check_output
from .precision import DTYPES


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    allow_pickle: bool = False,
    layout: str | None = None,
    config: str | Path | None = None,
) -> Path:
    """Convert a pipeline folder to a single file, or a single file to a folder; ``source`` says which.

    Args:
        source: folder with a ``model_index.json``; or a safetensors file (or ``.ckpt``).
        target: name of a ``.safetensors`` file; or a folder. What is already there is replaced only if it is such
            a file with modelspec metadata, or a pipeline and nothing else.
        dtype: ``fp16``, ``bf16`` or ``fp32``; by default each tensor keeps its own.
        allow_pickle: read a pickled checkpoint (its tensors only).
        layout: ``sd15``, ``sd21``, ``sdxl`` or ``sd3``, where it cannot be told.
        config: for a file: pipeline folder of the same family, whose tokenizers, and whose configs and scheduler where
            it has them, are taken. What the file says of itself comes next, then what its shapes tell.
    Returns:
        The target.
    Raises:
        ValueError: naming the file, the tensor or the option, and what was expected.
    """
    source, target = Path(source).expanduser().resolve(), Path(target).expanduser().resolve()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source == target or target in source.parents or (source in target.parents and source.is_dir()):
        raise ValueError(f"{target}: would overwrite or lie in what is converted; choose another name")
    check_output(target, "OUT", "file" if source.is_dir() else "folder")
    chosen = None if layout is None else LAYOUTS[layout]
    kept = None if dtype is None else DTYPES[dtype]
    if source.is_dir():
        return to_file(source, target, dtype=kept, layout=chosen)
    given = None if config is None else Path(config).expanduser()
    return to_folder(source, target, dtype=kept, layout=chosen, config=given, allow_pickle=allow_pickle)
