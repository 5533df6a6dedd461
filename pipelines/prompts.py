"""Prompts -> Cond for drawing: those that are longer than a CLIP reads, and words that count more or less than others.

encode(text, ["a (red:1.3) apple on a [wooden] table"], weighting=True)
encode(text, [a_page_of_text], long_prompt="chunk")
"""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5EncoderModel

from ldm.cond import Cond
from ldm.models.long_text import joined, parted
from ldm.models.text import TextEncoder, check_prompts

log = logging.getLogger(__name__)

LongPrompt = Literal["cut", "chunk", "refuse"]
LONG_PROMPTS = ("cut", "chunk", "refuse")
Fragment = tuple[str, float]  # a text and what it counts
Fragments = list[Fragment]
UP, DOWN = 1.1, 1 / 1.1  # of (round) and [square] brackets


def encode(
    text: TextEncoder,
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    prompts_3: Sequence[str] | None = None,
    *,
    max_sequence_length: int | None = None,
    long_prompt: LongPrompt = "cut",
    weighting: bool = False,
) -> Cond:
    """A row for each prompt.

    Args:
        prompts_2, prompts_3: what the second CLIP and T5 read, where it is not the same.
        max_sequence_length: T5's tokens, in sd3 and pixart.
        long_prompt: what becomes of a prompt of more tokens than an encoder reads (of a CLIP 77).

            - ``cut``: its end is left out, as by the stock pipelines, and a warning says what.
            - ``chunk``: it is cut between words into pieces of so many tokens, each with a start and an end of its own,
              whose embeddings (B, L, D) become one of (B, K L, D); ``pooled`` is the first piece's. So A1111's web UI
              and ComfyUI do it, and so does training with ``data.long_captions: chunk``. Beside longer prompts a
              shorter one hides what it lacks by ``bias``. sd3's T5 reads the whole prompt at once, up to
              ``max_sequence_length``; pixart's in pieces of that.
            - ``refuse``: ValueError.
        weighting: read ``(word:1.3)``, ``(word)``, ``[word]`` as ``weights`` does; a token z that counts w becomes
            e + w (z - e), with e what the encoder says in this place of the empty prompt, in every encoder. ``pooled``
            stays. This is ComfyUI's way (comfy/sd1_clip.py), and compel's for w > 1; A1111's scales z about 0 and then
            all tokens so that their mean is kept, which is no number where that is near 0. Where everything counts 1
            the result is, bit for bit, that of the text without its marks.
    Raises:
        ValueError: an empty list, what is not text, lists of different lengths; with ``refuse`` a prompt that is too
            long.
    """
    if long_prompt not in LONG_PROMPTS:
        raise ValueError(f"long_prompt {long_prompt!r} is not one of {', '.join(LONG_PROMPTS)}")
    given = [prompts, prompts_2 or prompts, prompts_3 or prompts]
    check_prompts(*given)
    read = [[weights(x) if weighting else [(x, 1.0)] for x in texts] for texts in given]
    reader = _Reader(text, max_sequence_length)
    if long_prompt != "chunk":
        if long_prompt == "refuse":
            reader.refuse_long(read)
        return reader.encode(*read)
    by_t5 = text.model_3 is not None
    parts = [[reader.pieces(x) for x in texts] for texts in read[: 2 if by_t5 else 3]]  # [encoder][prompt][piece]
    counts = torch.tensor([max(map(len, one)) for one in zip(*parts, strict=True)])  # (B,)
    most = int(counts.max())
    flat = [[piece for one in texts for piece in [*one, *[[("", 1.0)]] * (most - len(one))]] for texts in parts]
    whole = [[x for x in read[2] for _ in range(most)]] if by_t5 else []
    cond = reader.encode(*flat, *whole)
    fields = {"tokens": cond.tokens, "pooled": cond.pooled, "bias": cond.bias}
    found = {name: x.unflatten(0, (len(counts), most)) for name, x in fields.items() if x is not None}  # (B, K, …)
    return Cond(**joined(found, counts, reader.own))


def one_length(*conds: Cond) -> tuple[Cond, ...]:
    """The same with as many tokens in each, as one batch needs it: a shorter one gets zeros that its ``bias`` hides."""
    longest = max(cond.tokens.shape[1] for cond in conds)
    if all(cond.tokens.shape[1] == longest for cond in conds):
        several = any(cond.bias is not None for cond in conds)
        return tuple(_with_bias(cond) for cond in conds) if several else conds
    return tuple(_lengthened(_with_bias(cond), longest) for cond in conds)


def _with_bias(cond: Cond) -> Cond:
    return cond if cond.bias is not None else replace(cond, bias=cond.tokens.new_zeros(cond.tokens.shape[:2]))


def _lengthened(cond: Cond, length: int) -> Cond:
    more = length - cond.tokens.shape[1]
    bias: Any = cond.bias
    return replace(cond, tokens=F.pad(cond.tokens, (0, 0, 0, more)), bias=F.pad(bias, (0, more), value=-torch.inf))


# --- the syntax ------------------------------------------------------------------------------------------------------

_MARKS = re.compile(
    r"\\(?P<literal>[()\[\]\\])"
    r"|:\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<plain>[^\\()\[\]:]+|[\\:])"
)


def weights(prompt: str) -> Fragments:
    """A prompt as texts and what each counts, as A1111's web UI reads it.

    ``(word)`` counts 1.1, ``[word]`` 1 / 1.1, ``(word:1.3)`` 1.3; inside of each other they multiply. A bracket that is
    not closed reaches to the end, one that was not opened is a letter, as are ``\\(``, ``\\)``, ``\\[``, ``\\]`` and
    ``\\\\``. Neighbours that count the same are one text.
    """
    found: list[Fragment] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, by: float) -> None:
        start = open_at[bracket].pop()
        found[start:] = [(text, round(weight * by, 9)) for text, weight in found[start:]]  # 1.1 / 1.1 is 1

    for mark in _MARKS.finditer(prompt):
        whole, bracket = mark[0], mark["bracket"]
        if bracket in open_at:
            open_at[bracket].append(len(found))
        elif mark["number"] and open_at["("]:
            close("(", float(mark["number"]))
        elif bracket == ")" and open_at["("]:
            close("(", UP)
        elif bracket == "]" and open_at["["]:
            close("[", DOWN)
        else:
            found.append((mark["literal"] or whole, 1.0))
    for bracket, by in (("(", UP), ("[", DOWN)):
        while open_at[bracket]:
            close(bracket, by)
    return _merged(found) or [("", 1.0)]


def _merged(fragments: Sequence[Fragment], between: str = "") -> Fragments:
    """Neighbours of one weight as one text."""
    out: Fragments = []
    for text, weight in fragments:
        if out and out[-1][1] == weight:
            out[-1] = (out[-1][0] + between + text, weight)
        else:
            out.append((text, weight))
    return out


# --- fragments -> Cond -----------------------------------------------------------------------------------------------


class _Reader:
    """Fragments through the encoders of ``text``."""

    def __init__(self, text: TextEncoder, max_sequence_length: int | None):
        self.text, self.asked = text, max_sequence_length
        self.t5_tokens = max_sequence_length or text.max_sequence_length
        self.own = self._limit(text.model)  # tokens of a piece

    def pieces(self, fragments: Fragments) -> list[Fragments]:
        """Of as many tokens as are read at once, cut between words."""
        if self._fits(fragments):
            return [fragments]
        words = [(word, weight) for part, weight in fragments for word in part.split()]
        return [_merged(some, " ") for some in parted(words, lambda some: self._fits(_merged(some, " ")))]

    def _fits(self, fragments: Fragments) -> bool:
        return len(self._ids(self.text.tokenizer, fragments)[0]) <= self.own

    def _limit(self, model: Any) -> int:
        return self.t5_tokens if isinstance(model, T5EncoderModel) else self.text.tokenizer.model_max_length

    def _ids(self, tokenizer: Any, fragments: Fragments) -> tuple[list[int], list[float]]:
        """All ids with those at the ends, and what each counts."""
        *start, end = tokenizer("").input_ids
        ids, counts = list(start), [1.0] * len(start)
        for (_, weight), part in zip(fragments, self.text.as_read(tokenizer, [x for x, _ in fragments]), strict=True):
            own = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
            ids += own
            counts += [weight] * len(own)
        return [*ids, end], [*counts, 1.0]

    def _read_by(self, texts: Sequence[list[Fragments]]) -> list[tuple[str, Any, Any, list[Fragments]]]:
        """Of each encoder: its name, tokenizer, model and what it reads."""
        towers = self.text.towers()
        return [
            (name, *pair, texts[int(name[-1]) - 1 if i else 0])  # the only encoder of a refiner is its first
            for i, (name, pair) in enumerate(towers.items())
        ]

    def refuse_long(self, read: Sequence[list[Fragments]]) -> None:
        for name, tokenizer, model, rows in self._read_by(read):
            for i, fragments in enumerate(rows):
                n, limit = len(self._ids(tokenizer, fragments)[0]), self._limit(model)
                if n > limit:
                    raise ValueError(
                        f"prompt {i} has {n} tokens, {name} reads {limit}; shorten it, or give long_prompt='chunk' or "
                        "'cut'"
                    )

    def encode(self, *texts: list[Fragments]) -> Cond:
        """A row for each; what is longer than an encoder reads is cut."""
        ids, counts, masks, left_out = [], [], [], {}
        for name, tokenizer, model, rows in self._read_by(texts):
            limit, read = self._limit(model), [self._ids(tokenizer, fragments) for fragments in rows]
            for fragments, (own, _) in zip(rows, read, strict=True):
                if len(own) > limit:
                    kept = limit - len(tokenizer("").input_ids)
                    left_out.setdefault((self._after(tokenizer, fragments, kept), limit), []).append(name)
            cut = [tuple(x[:-1][: limit - 1] + x[-1:] for x in pair) for pair in read]  # but not the end token
            pad = tokenizer.pad_token_id
            ids.append(torch.tensor([own + [pad] * (limit - len(own)) for own, _ in cut]))  # (B, L)
            counts.append(torch.tensor([w + [1.0] * (limit - len(w)) for _, w in cut]))
            masks.append(torch.tensor([[1] * len(own) + [0] * (limit - len(own)) for own, _ in cut]))
        for (rest, limit), names in left_out.items():
            log.warning(
                "of a prompt %d tokens are read (%s); cut off is: %s", limit, ", ".join(dict.fromkeys(names)), rest
            )
        if all(weight == 1 for rows in texts for fragments in rows for _, weight in fragments):
            plain = [["".join(x for x, _ in fragments) for fragments in rows] for rows in texts]
            return self.text.encode(*plain, max_sequence_length=self.asked)
        cond = self.text(*ids, mask=masks[-1], empty_tokens=self.t5_tokens)
        empty = self.text.encode([""], max_sequence_length=self.asked).tokens  # (1, L, D)
        w = self._spread(counts, cond.tokens)  # (B, L, D)
        return replace(cond, tokens=cond.tokens + (w - 1) * (cond.tokens - empty))

    def _after(self, tokenizer: Any, fragments: Fragments, kept: int) -> str:
        """The text behind so many tokens, shortened to a line or two."""
        rest = ""
        for part in self.text.as_read(tokenizer, [x for x, _ in fragments]):
            places = tokenizer(
                part, add_special_tokens=False, verbose=False, return_offsets_mapping=True
            ).offset_mapping
            rest += part[places[kept][0] :] if 0 <= kept < len(places) else part if kept < 0 else ""
            kept = kept - len(places) if kept >= len(places) else -1
        return textwrap.shorten(rest, 200, placeholder=" …")

    def _spread(self, counts: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """What each number of the tokens (B, L, D) counts: CLIPs stand side by side, sd3's T5 after them."""
        w = torch.ones_like(tokens)
        column = 0
        for own, (_, model) in zip(counts, self.text.towers().values(), strict=True):
            each = own.to(tokens.device, tokens.dtype)[:, :, None]
            if isinstance(model, T5EncoderModel):
                w[:, -own.shape[1] :] = each
            else:
                width = model.config.hidden_size
                w[:, : own.shape[1], column : column + width] = each
                column += width
        return w
