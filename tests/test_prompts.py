"""Prompts that are longer than a CLIP reads, and words that count more: against A1111's reading of the syntax, a plain
forward pass of each piece, and what training shows a model.
"""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
from torch import Tensor

from ldm.models.new_tokens import place
from ldm.models.text import TextEncoder
from pipelines.prompts import encode, one_length, weights
from pipelines.stock import from_stock_pipeline
from tests import families
from training.encoders import encode_captions, pieces

CLIPS = ["sd", "sdxl", "sdxl second alone", "sd3", "sd3 without t5"]
LONG = "a red apple and a green apple and a zebra and a hot dog and a car"  # more than 14 tokens


@cache
def text_of(name: str) -> TextEncoder:
    return from_stock_pipeline(families.PIPELINES[name]()).text


def close(a: Tensor | None, b: Tensor | None) -> None:
    """Another batch sums in another order."""
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


# --- the syntax ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 1 / 1.1), (" cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("(red: 1.3 ) (sea:.5)(sky:2)", [("red", 1.3), (" ", 1), ("sea", 0.5), ("sky", 2)]),
        ("((a)) [[b]]", [("a", 1.21), (" ", 1), ("b", 1 / 1.21)]),
        ("(a (b:1.5) c:1.2)", [("a ", 1.2), ("b", 1.8), (" c", 1.2)]),  # they multiply, as in A1111; not in ComfyUI
        ("([a] b)", [("a", 1), (" b", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),  # across each other
        ("(one)(two)", [("onetwo", 1.1)]),  # neighbours of one weight
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1)]),
        (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
        (r"a \n b", [(r"a \n b", 1)]),
        ("(to the end", [("to the end", 1.1)]),
        ("[to (the end", [("to ", 1 / 1.1), ("the end", 1)]),
        ("not opened) here] 1:2 :3)", [("not opened) here] 1:2 :3)", 1)]),
        ("(a:b) (a:1.2.3) [a:1.5]", [("a:b", 1.1), (" ", 1), ("a:1.2.3", 1.1), (" ", 1), ("a:1.5", 1 / 1.1)]),
        ("(a:-1) (b:0)", [("a", -1), (" ", 1), ("b", 0)]),
        ("a () b", [("a  b", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",  # the example in A1111's own source
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
    ],
)  # fmt: skip
def test_the_syntax(prompt: str, expected: list[tuple[str, float]]):
    found = weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


# --- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [*CLIPS, "pixart alpha"])
def test_each_token_moves_away_from_the_empty_prompt_by_its_weight(name: str):
    text = text_of(name)
    plain, empty = text.encode(["a red apple"]), text.encode([""])
    found = encode(text, ["a (red:1.5) (apple:0.25)"], weighting=True)
    e, z = empty.tokens[0], plain.tokens[0]
    counts = torch.ones(len(z))
    if text.model_3 is not None:  # sd3: the CLIPs' start, "a", "red", "apple"; after their 14 T5's "a", "red", "apple"
        counts[[2, 3, 15, 16]] = torch.tensor([1.5, 0.25, 1.5, 0.25])
    else:
        first = 1 if name.startswith("pixart") else 2
        counts[first : first + 2] = torch.tensor([1.5, 0.25])
    close(found.tokens[0], e + counts[:, None] * (z - e))
    close(found.pooled, plain.pooled)
    assert (found.tokens - plain.tokens).abs().max() > 0.1
    close(found.bias, plain.bias)


@torch.no_grad()
@pytest.mark.parametrize("name", [*CLIPS, "pixart alpha"])
def test_weight_one_is_bit_for_bit_the_plain_prompt(name: str):
    text = text_of(name)
    plain = text.encode(["a red apple", "zebra (big)"])
    found = encode(text, ["a (red:1.0) [(apple)]", r"zebra \(big\)"], weighting=True)
    for key in ("tokens", "pooled", "bias"):
        a, b = getattr(found, key), getattr(plain, key)
        assert a is b is None or torch.equal(a, b)
    beside = encode(text, ["a red apple", "(zebra)"], weighting=True)  # where another prompt has weights
    assert torch.equal(beside.tokens[0], plain.tokens[0]) and not torch.equal(beside.tokens[1], plain.tokens[1])
    letters = encode(text, ["a red apple", "zebra (big)"])  # as stock reads it
    assert torch.equal(letters.tokens, plain.tokens)


@torch.no_grad()
def test_a_new_token_of_several_vectors_has_the_weight_on_each():
    text = from_stock_pipeline(families.sdxl()).text
    vectors = {name: {"<toy>": torch.randn(3, m.config.hidden_size)} for name, (_, m) in text.towers().items()}
    place(text, vectors)
    plain, empty = text.encode(["a <toy> apple"]).tokens[0], text.encode([""]).tokens[0]
    found = encode(text, ["a (<toy>:1.4) apple"], weighting=True).tokens[0]
    counts = torch.ones(len(plain))
    counts[2:5] = 1.4
    close(found, empty + counts[:, None] * (plain - empty))
    long = encode(text, ["a red apple red apple red apple red apple red <toy> zebra"], long_prompt="chunk")
    parts = ["a red apple red apple red apple red apple red", "<toy> zebra"]  # 12 tokens, and no room for three more
    close(long.tokens[0], text.encode(parts).tokens.flatten(0, 1))


# --- long prompts ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [*CLIPS, "pixart alpha"])
def test_chunks_are_what_training_shows_a_model(name: str):
    text = text_of(name)
    prompts = ["zebra", LONG, f"{LONG} zebra apple tree"] if text.family != "pixart" else ["zebra", "apple tree " * 90]
    found = encode(text, prompts, long_prompt="chunk")
    null, none = text.null(), torch.zeros(len(prompts), dtype=torch.bool)
    trained = encode_captions(text, prompts, "chunk", null, none)
    for key in ("tokens", "pooled", "bias"):
        close(getattr(found, key), getattr(trained, key))
    own = text.max_length
    for i, parts in enumerate(pieces(text, prompts, "chunk")):  # and each piece is read by itself
        assert (len(parts) > 1) == (i > 0)
        one = text.encode(parts, None, [prompts[i]] * len(parts))
        close(found.tokens[i, : own * len(parts)], one.tokens[:, :own].flatten(0, 1))
        behind = one.tokens.shape[1] - own  # of sd3: T5's, of the whole prompt, or the one that stands for 256 zeros
        close(found.tokens[i, found.tokens.shape[1] - behind :], one.tokens[0, own:])
        if found.pooled is not None and one.pooled is not None:
            close(found.pooled[i], one.pooled[0])
        assert found.bias is not None
        assert (found.bias[i] > -torch.inf)[: own * len(parts)].all() or text.family == "pixart"
        assert (found.bias[i, own * len(parts) : found.tokens.shape[1] - behind] == -torch.inf).all()


@torch.no_grad()
def test_weights_in_chunks():
    text = text_of("sdxl")
    found = encode(text, [f"({LONG} apple:1.5) zebra"], long_prompt="chunk", weighting=True)
    *others, last = pieces(text, [LONG + " apple zebra"], "chunk")[0]
    assert others and last == "zebra"
    parts = [*(f"({part}:1.5)" for part in others), last]
    apart = encode(text, parts, weighting=True)
    close(found.tokens[0], apart.tokens.flatten(0, 1))
    assert apart.pooled is not None
    close(found.pooled, apart.pooled[:1])


@torch.no_grad()
def test_the_second_encoder_may_read_another_text():
    text = text_of("sdxl")
    found = encode(text, ["zebra"], [LONG], long_prompt="chunk")
    parts = pieces(text, [LONG], "chunk")[0]
    expected = text.encode(["zebra", *[""] * (len(parts) - 1)], parts)
    close(found.tokens[0], expected.tokens.flatten(0, 1))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart alpha"])
def test_cut_says_what_is_cut_and_refuse_refuses(name: str, caplog: pytest.LogCaptureFixture):
    text = text_of(name)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        encode(text, ["a red apple"])
        assert not caplog.records
        kw = {"max_sequence_length": 20} if text.family == "pixart" else {}
        prompt = LONG + " with an umbrella" * 2
        found = encode(text, [prompt] * 2, **kw)
        assert torch.equal(found.tokens, text.encode([prompt] * 2, **kw).tokens)  # stock's
    assert len(caplog.messages) >= 1 and caplog.messages[0].count("umbrella") in (1, 2)
    assert {"sd": "14 tokens", "sdxl": "text_encoder, text_encoder_2", "sd3": "14 tokens", "pixart alpha": "20 tokens"}[
        name
    ] in caplog.messages[0]
    assert caplog.messages[0].endswith("an umbrella with an umbrella") or text.family == "pixart"
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, text_encoder reads (14|20); .*long_prompt='chunk'"):
        encode(text, ["zebra", prompt], long_prompt="refuse", **kw)
    encode(text, ["zebra"], long_prompt="refuse", **kw)


def test_what_is_no_prompt():
    text = text_of("sd")
    with pytest.raises(ValueError, match="long_prompt 'shorten' is not one of cut, chunk, refuse"):
        encode(text, ["zebra"], long_prompt="shorten")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one or more texts"):
        encode(text, [], weighting=True)
    with pytest.raises(ValueError, match="rows; expected as many of each"):
        encode(text_of("sdxl"), ["a"], ["a", "b"], long_prompt="chunk")


# --- one length ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sd3", "pixart alpha"])
def test_what_is_added_is_not_seen(name: str):
    """The network's answer to the longer null prompt is that to the short one."""
    parts = from_stock_pipeline(families.PIPELINES[name]())
    cond = encode(parts.text, ["zebra " * 150], long_prompt="chunk")
    short = parts.text.null()
    a, b = one_length(cond, short)
    assert a.tokens.shape == b.tokens.shape and torch.equal(a.tokens, cond.tokens)
    x, t = families.waves(1, 4, 8, 8), torch.tensor([300.0])
    torch.testing.assert_close(parts.net(x, t, b), parts.net(x, t, short), atol=1e-5, rtol=1e-4)
    assert one_length(short, short) == (short, short)
