"""Words that the text encoders do not know yet: textual inversion (Gal et al. 2022), and the tokens of pivotal tuning.

A new token has vectors of its own in every text encoder of a model. They are small parameters beside the table of the
words that are known, which is neither copied nor changed; checkpoints, optimizer and EMA see them alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from .text import TextEncoder
from .text_files import Tokenizer

log = logging.getLogger(__name__)

Vectors = Mapping[str, Mapping[str, Tensor]]  # of each encoder by its stock name: token -> (n, D)


class GrownEmbedding(nn.Module):
    """A table of embeddings with new rows in it.

    weight: (V, D), the old table's own parameter. new: (n, D) float32 each, one for each time that tokens were added.

    Args:
        old: the table, which is kept to be put back.
        tokenizer: as it was.
        first: id of the first new row. Ids from there on are new, even where the old table has spare rows (T5's).
    """

    def __init__(self, old: nn.Embedding, tokenizer: Tokenizer, first: int):
        super().__init__()
        self.weight, self.new = old.weight, nn.ParameterList()
        self.first, self.tokens = first, dict[str, int]()  # of each new token its number of rows, in their order
        # not listed as a part: its weight is this module's too
        self.__dict__["before"] = old, tokenizer, old.weight.requires_grad

    def rows(self) -> Tensor:
        """(n, D) of all new tokens."""
        return self.new[0] if len(self.new) == 1 else torch.cat(list(self.new))

    def forward(self, ids: Tensor) -> Tensor:
        new = ids >= self.first  # (B, L)
        old = F.embedding(ids.masked_fill(new, 0), self.weight)  # (B, L, D)
        rows = F.embedding((ids - self.first).clamp(min=0), self.rows())
        return torch.where(new[..., None], rows.to(old.dtype), old)

    @property
    def size(self) -> int:
        """Rows of a plain table that holds all."""
        return max(len(self.weight), self.first + sum(self.tokens.values()))

    @torch.no_grad()
    def plain(self) -> nn.Embedding:
        rows, weight = self.rows().to(self.weight.dtype), self.weight
        table = torch.cat([weight[: self.first], rows, weight[self.first + len(rows) :]])
        return nn.Embedding.from_pretrained(table)


def add_tokens(text: TextEncoder, tokens: Sequence[tuple[str, str | None, int]]) -> list[nn.Parameter]:
    """Teach all encoders of ``text`` new words: ``<toy>`` of three vectors becomes the entries ``<toy>``, ``<toy>_1``,
    ``<toy>_2`` of each tokenizer, and a prompt with ``<toy>`` is read as all three, as by stock pipelines.

    The tokenizers are copied first; others who hold them see no change. The tables of known words are frozen.

    Args:
        tokens: (token, initializer, vectors). Each vector starts as the embedding of the initializer, one known word;
            of None, as a normal one with the table's mean and standard deviation, from torch's global generator.
    Returns:
        The parameters that train: one (n, D) in float32 of each encoder.
    Raises:
        ValueError: a token that is known already, an initializer that is no single word to one of the tokenizers. Then
            nothing has changed.
    """
    if not tokens:
        raise ValueError("no new tokens were given")
    names = [token for token, _, _ in tokens]
    if twice := next((token for token in names if names.count(token) > 1), None):
        raise ValueError(f"new token {twice!r} is given twice")
    for name, (tokenizer, _) in text.towers().items():
        for token, initializer, count in tokens:
            if count < 1:
                raise ValueError(f"new token {token!r}: {count} vectors, expected 1 or more")
            if token.split() != [token]:
                raise ValueError(f"new token {token!r}: expected one word without spaces, such as '<toy>'")
            if len(_ids(text, tokenizer, token)) == 1 and not _unknown(text, tokenizer, token):
                raise ValueError(f"new token {token!r} is a word that {name} knows already; choose another, as '<toy>'")
            if initializer is not None:
                _check_initializer(text, name, token, initializer)
    start = {
        name: {token: _start(text, name, initializer, count) for token, initializer, count in tokens}
        for name in text.towers()
    }
    if text.family == "pixart" and any("<" in token for token, _, _ in tokens):
        log.warning("stock's PixArt pipelines take <words> for HTML and drop them: call them with clean_caption=False")
    return place(text, start, trainable=True)


def place(text: TextEncoder, vectors: Vectors, *, trainable: bool = False) -> list[nn.Parameter]:
    """``add_tokens`` for vectors that are there; encoders that are not named stay as they are.

    Raises:
        ValueError: an encoder that there is not, a token that is in its vocabulary, vectors of another width. Then
            nothing has changed.
    """
    towers, plan = text.towers(), []
    for name, own in vectors.items():
        if name not in towers:
            raise ValueError(f"new tokens for {name}, but the encoders are {', '.join(towers)}")
        model: Any = towers[name][1]
        width = model.get_input_embeddings().weight.shape[1]
        for token, rows in own.items():
            if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
                raise ValueError(f"{token!r}: vectors of {tuple(rows.shape)}, but {name} takes (n, {width})")
        plan.append((name, own, _extended(text, name, {token: len(rows) for token, rows in own.items()})))
    return [_put(text, name, own, tokenizer, trainable) for name, own, tokenizer in plan]


def _put(
    text: TextEncoder, name: str, vectors: Mapping[str, Tensor], tokenizer: Tokenizer, trainable: bool
) -> nn.Parameter:
    old_tokenizer, model = text.towers()[name]
    table: Any = model.get_input_embeddings()
    if not isinstance(table, GrownEmbedding):
        table = GrownEmbedding(table, old_tokenizer, len(old_tokenizer))
        model.set_input_embeddings(table)
    table.weight.requires_grad_(False)
    rows = torch.cat([*vectors.values()]).to(table.weight.device, torch.float32, copy=True)
    table.new.append(nn.Parameter(rows, requires_grad=trainable))
    table.tokens |= {token: len(x) for token, x in vectors.items()}
    model.config.vocab_size = table.size
    text.set_tokenizer(name, tokenizer)
    if isinstance(model, CLIPTextModelWithProjection) and model.config.eos_token_id == 2:
        log.warning(
            "%s pools at the highest id of a prompt (its config's eos_token_id is 2), as in stock: of a prompt with a "
            "new token that is the token's place, not the end",
            name,
        )
    return table.new[-1]


def remove_tokens(text: TextEncoder) -> None:
    """Forget all new tokens: tables, tokenizers and configs are what they were."""
    for name, (_, model) in text.towers().items():
        table: Any = model.get_input_embeddings()
        if isinstance(table, GrownEmbedding):
            before: tuple[nn.Embedding, Tokenizer, bool] = table.__dict__["before"]
            old, tokenizer, trains = before
            old.weight = table.weight  # it may have moved to another device
            old.weight.requires_grad_(trains)
            model.set_input_embeddings(old)
            model.config.vocab_size = len(old.weight)
            text.set_tokenizer(name, tokenizer)


def vectors_of(text: TextEncoder) -> dict[str, dict[str, Tensor]]:
    """The new tokens of each encoder that has any: token -> (n, D) float32, copies on the CPU."""
    found = {}
    for name, (_, model) in text.towers().items():
        table: Any = model.get_input_embeddings()
        if isinstance(table, GrownEmbedding):
            rows = table.rows().detach().float().cpu().clone().split(list(table.tokens.values()))
            found[name] = dict(zip(table.tokens, rows, strict=True))
    return found


def merged(text: TextEncoder) -> TextEncoder:
    """``text`` with one plain table of known and new words in each encoder, as a pipeline folder stores it:
    ``save_parts(folder, replace(parts, text=merged(parts.text)))``. All other weights are shared, nothing is changed;
    without new tokens it is ``text`` itself.
    """
    if not vectors_of(text):
        return text
    towers = {}
    for name, (tokenizer, model) in text.towers().items():
        table: Any = model.get_input_embeddings()
        if isinstance(table, GrownEmbedding):
            shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
            model = copy.deepcopy(model, {**shared, id(table): table.plain()})
        towers[name] = (tokenizer, model)
    return TextEncoder.from_towers(
        towers,
        text.family,
        text.width,
        max_sequence_length=text.max_sequence_length or None,
        zeros_for_empty=text.zeros_for_empty,
    )


def check_words(text: TextEncoder, words: Sequence[str]) -> None:
    """Raises ValueError naming a trigger or prompt of which one of the tokenizers reads nothing at all."""
    for name, (tokenizer, _) in text.towers().items():
        for word in words:
            if _unknown(text, tokenizer, word):
                raise ValueError(
                    f"{word!r} says nothing to {name}: its tokenizer splits it into nothing that it knows; choose a "
                    "trigger of letters that it knows, as 'sks'"
                )


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _ids(text: TextEncoder, tokenizer: Tokenizer, word: str) -> list[int]:
    return tokenizer(text.as_read(tokenizer, [word])[0], add_special_tokens=False).input_ids


def _unknown(text: TextEncoder, tokenizer: Any, word: str) -> bool:
    empty = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("▁")  # T5's sign that a word begins
    return set(_ids(text, tokenizer, word)) <= set(empty)


def _check_initializer(text: TextEncoder, name: str, token: str, initializer: str) -> None:
    tokenizer: Any = text.towers()[name][0]
    ids = _ids(text, tokenizer, initializer)
    if len(ids) == 1 and not _unknown(text, tokenizer, initializer):
        return
    pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) or "nothing"
    raise ValueError(
        f"initializer_token {initializer!r} of {token!r}: {name} splits it into {pieces}; expected one word that it "
        "knows as a whole. Take another word, or leave it out to start at random"
    )


def _start(text: TextEncoder, name: str, initializer: str | None, count: int) -> Tensor:
    """(count, D) float32 on the CPU."""
    tokenizer, model = text.towers()[name]
    table: Any = model.get_input_embeddings()
    with torch.no_grad():
        if initializer is not None:
            ids = torch.tensor(_ids(text, tokenizer, initializer), device=table.weight.device)
            return table(ids).float().cpu().expand(count, -1)
        known = table.weight.float()
        return torch.randn(count, known.shape[1]) * known.std().cpu() + known.mean().cpu()


def _extended(text: TextEncoder, name: str, tokens: Mapping[str, int]) -> Tokenizer:
    """A copy of the tokenizer with the tokens' entries, of which each is read as one."""
    known_words, model = text.towers()[name]
    tokenizer: Any = copy.deepcopy(known_words)
    first = getattr(model.get_input_embeddings(), "first", len(known_words))
    for token, count in tokens.items():
        entries = [token, *(f"{token}_{i}" for i in range(1, count))]
        known = tokenizer.get_vocab()
        for entry in [*entries, f"{token}_{count}"]:  # the last would be taken for one vector more
            if entry in known:
                raise ValueError(f"new token {token!r}: {entry!r} is in the vocabulary of {name}; choose another")
        tokenizer.add_tokens(entries)
    for number, added in tokenizer.added_tokens_decoder.items():
        read = added.content.lower() if text.family == "pixart" else added.content
        if number >= first and tokenizer(read, add_special_tokens=False).input_ids != [number]:
            raise ValueError(
                f"new tokens {', '.join(tokens)}: {name} would not read {added.content!r} as one token of its own, "
                "since it is too like another one, or (in pixart) not in lower case; choose others"
            )
    return tokenizer
