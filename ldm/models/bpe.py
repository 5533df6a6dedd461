"""A CLIP tokenizer of one's own: byte-level BPE with the conventions of OpenAI's CLIP (Radford et al. 2021, §2.4)."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def train_tokenizer(captions: Iterable[str], vocab_size: int = 4096, max_length: int = 77) -> CLIPTokenizer:
    """Learn the merges of frequent pairs (Sennrich et al. 2016) from captions.

    The vocabulary is laid out as CLIP's: 256 bytes, the same 256 at the end of a word, the merges, start, end.
    So every text can be written, whatever its script, and the end token, which is also the padding, has the
    highest id (on which CLIP's pooling relies).

    Args:
        captions: the texts; upper case counts as lower case.
        vocab_size: most entries to have, at least 514. Fewer come out where no pair is left that occurs twice.
        max_length: tokens per text, start and end included; stored with the tokenizer.
    Returns:
        A tokenizer that ``save_pretrained`` and ``CLIPTokenizer.from_pretrained`` carry over unchanged, and
        which depends on the captions and their number alone, not on their order.
    Raises:
        ValueError: ``vocab_size`` or ``max_length`` is too small.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [c + WORD_END for c in alphabet]
    if vocab_size < len(base) + 2:
        raise ValueError(f"vocab_size is {vocab_size}, expected {len(base) + 2} or more: the bytes take {len(base)}")
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}, expected 3 or more: start and end take two tokens")

    clip = clip_tokenizer(base, [], max_length).backend_tokenizer  # lends its way of cutting a text into words
    learner = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    # As "special tokens" the base gets fixed ids: else those of final bytes follow a hash order, and ties with them.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        special_tokens=list(base),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return clip_tokenizer(base, merges, max_length)


def clip_tokenizer(base: list[str], merges: list[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    """A ``CLIPTokenizer`` over ``base``, the products of ``merges``, start and end, in this order."""
    entries = list(dict.fromkeys([*base, *(a + b for a, b in merges), START, END]))
    vocab = {entry: i for i, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)  # type: ignore[arg-type]
