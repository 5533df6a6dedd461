"""What to draw with where a run's folder is named: its pipeline, or its base and what it adds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from .fit import ConfigError

INDEX = "model_index.json"


class Model(NamedTuple):
    """A pipeline folder or hub name, and the LoRA and token files that go with it."""

    folder: str
    lora: str | None = None
    embeddings: tuple[str, ...] = ()
    name: str = ""  # for a person: of outputs/demo/pipeline it is demo

    @property
    def adapters(self) -> tuple[str, ...]:
        return (*((self.lora,) if self.lora else ()), *self.embeddings)


def model_of(source: str | Path) -> Model:
    """The model for a pipeline folder, a run's folder or a hub name.

    A run's folder holds ``pipeline/``; or ``adapter/``, which is drawn over the ``base`` of its config.

    Raises:
        ConfigError: a run that has made neither yet, or whose base is not there.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        return Model(str(source), name=path.name)
    whole = path.absolute()
    if (path / INDEX).is_file():
        return Model(str(source), name=whole.parent.name if whole.name == "pipeline" else whole.name)
    if (path / "pipeline" / INDEX).is_file():
        return Model(str(path / "pipeline"), name=whole.name)
    config = path / "config.yaml"
    if not config.is_file():
        return Model(str(source), name=whole.name)  # no run; the loader says what is missing
    adapter = path / "adapter"
    if not adapter.is_dir():
        raise ConfigError(
            f"{path}: is a run without a pipeline or an adapter; let it end (the same `ldm train` goes on with it)"
        )
    base = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("base", "")
    place = Path(base).expanduser()
    if place.is_file() and (path / "base" / INDEX).is_file():  # a single file, converted for the run
        place = path / "base"
    elif (place / "pipeline" / INDEX).is_file():
        place = place / "pipeline"
    elif not place.is_dir() and (base.startswith((".", "~", "/")) or base.count("/") != 1 or place.parent.is_dir()):
        raise ConfigError(
            f"{path}: its base {base} is not here; run from the folder where it was trained, or give the base and "
            f"--lora {path}"
        )
    has_lora = any((adapter / file).is_file() for file in ("pytorch_lora_weights.safetensors", "adapter_config.json"))
    tokens = tuple(str(file) for file in sorted(adapter.glob("learned_embeds*.safetensors")))
    folder = str(place) if place.is_dir() else base
    return Model(folder, str(adapter) if has_lora else None, tokens, whole.name)
