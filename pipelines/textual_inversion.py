"""New tokens as files, in the forms that people exchange: safetensors that stock ``load_textual_inversion`` takes."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.models.new_tokens import place, vectors_of
from ldm.models.text import TextEncoder

FILE = "learned_embeds.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}  # of families with several
A1111 = "emb_params"


def save_embeddings(file: str | Path, text: TextEncoder) -> list[Path]:
    """Write the new tokens of ``text``, each into a file: ``file`` itself where there is one token, else
    ``learned_embeds_toy.safetensors`` and so on beside it.

    SD and PixArt: ``{token: (n, D)}``, which ``pipe.load_textual_inversion(file)`` takes. SDXL: ``clip_l`` and
    ``clip_g`` (of the refiner the latter), of which stock takes one at a time:
    ``pipe.load_textual_inversion(state["clip_g"], token=token, text_encoder=pipe.text_encoder_2,
    tokenizer=pipe.tokenizer_2)``. SD3: the same and ``t5``; stock's SD3 and PixArt pipelines have no loader for new
    tokens, but a pipeline folder that is saved with them has them inside.

    Returns:
        The files, in the order of the tokens.
    Raises:
        ValueError: there are no new tokens; the name does not end in .safetensors.
    """
    file = Path(file).expanduser()
    vectors = vectors_of(text)
    tokens = list(dict.fromkeys(token for own in vectors.values() for token in own))
    if not tokens:
        raise ValueError(f"{file}: the text encoders have no new tokens to be saved")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: new tokens are written as .safetensors; name it so")
    names = [file] if len(tokens) == 1 else _names(file, tokens)
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, token in zip(names, tokens, strict=True):
        own = {tower: rows[token] for tower, rows in vectors.items() if token in rows}
        state = (
            {KEYS[tower]: rows for tower, rows in own.items()} if _several(text) else {token: next(iter(own.values()))}
        )
        _write(name, {key: rows.contiguous() for key, rows in state.items()}, token)
    return names


def load_embeddings(
    text: TextEncoder, source: str | Path | Mapping[str, Tensor], token: str | Sequence[str] | None = None
) -> list[str]:
    """Teach ``text`` the tokens of a file; they do not train.

    Args:
        source: what ``save_embeddings`` wrote, or diffusers' scripts, or AUTOMATIC1111 (``{"emb_params": (n, D)}``): a
            file, a folder with ``learned_embeds*.safetensors``, the output_dir of a run (``adapter/``), or the tensors.
        token: what it is called; by default as in the file, and where that does not tell, as the file itself, which is
            AUTOMATIC1111's custom. A list of as many as there are vectors calls each by its own.
    Returns:
        The tokens.
    Raises:
        ValueError: no such file, a pickle, tensors of another model, a token that is known already. Then nothing has
            changed.
    """
    read = [(dict(source), None, "the tensors given")] if isinstance(source, Mapping) else _read(Path(source))
    if token is not None and len(read) > 1:
        raise ValueError(f"{source}: holds {len(read)} files; load them one by one to give them other tokens")
    found: dict[str, dict[str, Tensor]] = {}
    for state, name, where in read:
        for tower, own in _vectors(text, state, token, name, where).items():
            known = found.setdefault(tower, {})
            if twice := known.keys() & own.keys():
                raise ValueError(
                    f"{where}: token {min(twice)!r} stands in another file here too; remove one of the two"
                )
            known |= own
    place(text, found)
    return list(dict.fromkeys(name for own in found.values() for name in own))


def _vectors(
    text: TextEncoder, state: Mapping[str, Tensor], token: str | Sequence[str] | None, name: str | None, where: str
) -> dict[str, dict[str, Tensor]]:
    """Of each encoder, token -> (n, D)."""
    towers = list(text.towers())
    if set(state) <= set(KEYS.values()):
        parts = {tower: state[key] for tower, key in KEYS.items() if tower in towers and key in state}
        missing = [KEYS[tower] for tower in towers if tower not in parts and KEYS[tower] != "t5"]
        if not _several(text) or missing:
            raise ValueError(
                f"{where}: holds {', '.join(state)}, but this model of the family {text.family!r} has "
                f"{', '.join(towers)}: it is for another model"
            )
        named = token or name
    elif _several(text):
        raise ValueError(
            f"{where}: holds {', '.join(sorted(state)[:3])}; expected clip_l and clip_g, for {', '.join(towers)}: it "
            "is for a model of one text encoder"
        )
    elif set(state) == {A1111}:
        parts, named = {towers[0]: state[A1111]}, token or name
    elif token is None:
        return {towers[0]: {key: _rows(rows, where) for key, rows in state.items()}}
    elif len(state) == 1:
        parts, named = {towers[0]: next(iter(state.values()))}, token
    else:
        raise ValueError(f"{where}: holds {len(state)} tokens, which cannot all be called {token!r}; leave token out")
    if named is None:
        raise ValueError(f"{where}: does not say what its token is called; give token='<…>'")
    return {tower: _called(named, _rows(rows, where), where) for tower, rows in parts.items()}


def _called(names: str | Sequence[str], rows: Tensor, where: str) -> dict[str, Tensor]:
    if isinstance(names, str):
        return {names: rows}
    if len(names) != len(rows) or len(set(names)) != len(names):
        raise ValueError(f"{where}: {len(rows)} vectors; expected as many tokens, each another, got {list(names)}")
    return dict(zip(names, rows.split(1), strict=True))


def _rows(rows: Tensor, where: str) -> Tensor:
    if rows.ndim not in (1, 2) or not rows.is_floating_point():
        raise ValueError(f"{where}: holds {rows.dtype} of {tuple(rows.shape)}, expected vectors (n, D)")
    return rows[None] if rows.ndim == 1 else rows


def _several(text: TextEncoder) -> bool:
    return text.family in ("sdxl", "sd3")


# --- files -----------------------------------------------------------------------------------------------------------


def _read(source: Path) -> list[tuple[dict[str, Tensor], str | None, str]]:
    """Of each file: its tensors, what their token is called, and the file's name."""
    source = source.expanduser()
    if not source.is_dir():
        return [_read_file(source)]
    for folder in (source, source / "adapter"):
        if files := sorted(folder.glob("learned_embeds*.safetensors")):
            return [_read_file(file) for file in files]
    raise ValueError(f"{source}: no learned_embeds*.safetensors in this folder, nor in its adapter/")


def _read_file(file: Path) -> tuple[dict[str, Tensor], str | None, str]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file or folder of new tokens")
    advice = "only .safetensors is read, since a pickle may run code; convert it with a tool that you trust"
    if file.suffix in PICKLES:
        raise ValueError(f"{file}: {advice}")
    try:
        with safe_open(file, "pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # it is no dict
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is no safetensors file that can be read ({error}); {advice}") from error
    if not state:
        raise ValueError(f"{file}: is empty")
    return state, metadata.get("token") or file.stem, str(file)


def _names(file: Path, tokens: Sequence[str]) -> list[Path]:
    """Beside each other, with what of the tokens may stand in a file's name."""
    found: list[Path] = []
    for token in tokens:
        word = f"{file.stem}_{re.sub(r'[^A-Za-z0-9_]+', '', token) or 'token'}"
        if any(other.stem == word for other in found):  # "<a>" and "a"; no token holds a dash now
            word += f"-{len(found)}"
        found.append(file.with_name(f"{word}.safetensors"))
    return found


def _write(file: Path, state: dict[str, Tensor], token: str) -> None:
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    try:
        save_file(state, beside, metadata={"token": token})  # of two entries the order, and so the file, is by chance
        os.chmod(beside, 0o644)
        os.replace(beside, file)
    finally:
        Path(beside).unlink(missing_ok=True)
