"""Reading configs: YAML with dotted overrides into the typed sections of ``schema``. Knows no torch: a bad config is
refused before torch is imported."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from .fit import ConfigError, contradiction
from .schema import AdaptConfig, AutoencoderConfig, ClipConfig, Config, DiffusionConfig, Pretrained

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Annotated[Config, Field(discriminator="task")])
_TASKS = {
    "autoencoder": AutoencoderConfig, "clip": ClipConfig, "diffusion": DiffusionConfig, "adapt": AdaptConfig,
}  # fmt: skip


_KEYS = {key for kind in _TASKS.values() for key in kind.model_fields}  # at the top of a config


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats and booleans: 1e-4 is a number, `no` a word. A key that stands twice in one
    section is refused: PyYAML keeps the second and drops the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in lines:
                raise ConfigError(f"`{key}` stands twice, in lines {lines[key]} and {line}; join them")
            lines[key] = line
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes the words that ``_Loader`` would take for numbers."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [x for x in resolvers if x[0] != _BOOL] for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _class in (_Loader, Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?|\.inf|\.nan)$"
        ),
        list("-+0123456789."),
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply ``key.key=value`` overrides, check it.

    Raises:
        ConfigError: the file is not there or not YAML, a key is unknown (with a suggestion), a value has the wrong type
            or range, or sizes cannot work together.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; `ldm init` lists those that come with the package")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(raw).__name__}")
    for override in overrides:
        put(raw, override)
    return parse(raw, str(path))


def parse(raw: Mapping[str, Any], where: str) -> Config:
    """Check a plain dictionary; ``where`` is named in the messages."""
    if not isinstance(raw.get("task"), str) or raw["task"] not in _TASKS:
        hint = _did_you_mean(str(raw.get("task")), _TASKS)
        raise ConfigError(f"{where}: task: {raw.get('task')!r} is not one of {', '.join(_TASKS)}{hint}")
    try:
        config = _ADAPTER.validate_python(raw)
    except ValidationError as error:
        lines = [_explain(e, _TASKS[raw["task"]]) for e in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error
    problem = contradiction(config)
    if problem:
        raise ConfigError(f"{where}: {problem}")
    return config


def relocate(configs: Sequence[Config], root: str | Path) -> list[Config]:
    """The same runs under another folder: each ``output_dir`` becomes ``root/`` and its last name, and what pointed to
    one of them follows. So does what points to a run beside them that is not among ``configs`` and is in ``root``
    already: the earlier stages of one that is trained again."""
    moved = {Path(c.output_dir).resolve(): str(Path(root) / Path(c.output_dir).name) for c in configs}
    beside = {place.parent for place in moved}

    def follow(name: str) -> str:
        place, there = Path(name).resolve(), Path(root) / Path(name).name
        if place in moved:
            return moved[place]
        return str(there) if place.parent in beside and (there / "config.yaml").is_file() else name

    result: list[Config] = []
    for config in configs:
        update: dict[str, Any] = {"output_dir": follow(config.output_dir)}
        if isinstance(config, DiffusionConfig):
            update["vae"] = Pretrained(pretrained=follow(config.vae.pretrained))
            update["text"] = Pretrained(pretrained=follow(config.text.pretrained))
        if isinstance(config, AdaptConfig):
            update["base"] = follow(config.base)
        if isinstance(config, AutoencoderConfig) and (config.loss.perceptual or "").startswith("clip:"):
            source = "clip:" + follow((config.loss.perceptual or "").removeprefix("clip:"))
            update["loss"] = config.loss.model_copy(update={"perceptual": source})
        result.append(config.model_copy(update=update))
    return result


def dump(config: Config) -> str:
    """The whole config as YAML, defaults written out: this text alone repeats the run."""
    return yaml.dump(json.loads(config.model_dump_json()), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def overrides_of(name: str, overrides: Sequence[str], names: Collection[str]) -> list[str]:
    """Those for the config ``name``, among several: ``name.key=value`` is for it alone, without its name.

    Args:
        names: of all the configs. A first key that is one of them and a key of this config (``vae``, in a config
            called vae and as the diffusion task's section) is the name only where the second key is a section's.
    """
    found = []
    for text in overrides:
        first, _, rest = text.partition(".")
        section = rest.partition("=")[0].partition(".")[0]
        if "." not in text.partition("=")[0] or first not in names or section not in _KEYS:
            found.append(text)
        elif first == name:
            found.append(rest)
    return found


def put(raw: dict[str, Any], text: str) -> None:
    """``key.key=value`` into a plain dictionary."""
    key, eq, value = text.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {text!r}: expected key=value, for example train.images=1000")
    *parents, last = key.split(".")
    for part in parents:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {text!r}: {part} is a value, not a section")
    try:
        raw[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: not a YAML value: {error}") from error


def _explain(error: Any, root: type[BaseModel]) -> str:
    fields, names = _follow(root, [str(x) for x in error["loc"][1:]])  # the first is the task's tag
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        return f"unknown key `{key}`{_did_you_mean(names[-1], fields)}"
    if error["type"] == "missing":
        return f"`{key}` is missing"
    return f"`{key}`: {error['msg'].lower()}, got {error['input']!r}"


def _follow(model: Any, loc: Sequence[str]) -> tuple[list[str], list[str]]:
    """The keys known at the place of an error, and its path as it is written in the file: without the names of kinds
    that pydantic puts in."""
    names: list[str] = []
    for part in loc:
        kinds = [kind for kind in get_args(model) if _is_section(kind)]
        tags = {kind: get_args(kind.model_fields["name"].annotation) for kind in kinds if "name" in kind.model_fields}
        tagged = next((kind for kind, tag in tags.items() if part in tag), None)
        if tagged is not None:
            model = tagged
            continue
        names.append(part)
        if not _is_section(model) and len(kinds) == 1 and not part.isdigit():  # a section that may be left out
            model = kinds[0]
        if _is_section(model) and part in model.model_fields:
            model = model.model_fields[part].annotation
        elif part.isdigit() and len(kinds) == 1:  # of a list of sections
            model = kinds[0]
    return list(model.model_fields) if _is_section(model) else [], names


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _did_you_mean(word: str, names: Any) -> str:
    names = list(names)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(names)}" if names else ""
