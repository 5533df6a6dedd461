"""What the page's form may ask for, and what a PNG gives back."""

import pytest

from pipelines.app_settings import Limits, Settings, from_picture

LIMITS = Limits(8, ("ddim", "euler"), ("a.safetensors", "b.safetensors"), max_side=512, max_steps=100, max_pictures=4)
FORM = dict(
    prompt=" a red apple ", negative_prompt="", sampler="", num_inference_steps=20.0, guidance_scale=3, seed=7,
    width=64, height=128, pictures=2, loras={"b.safetensors": 0.5, "a.safetensors": 0},
)  # fmt: skip


def test_a_good_form():
    settings = Settings.from_form(LIMITS, **FORM)
    assert settings == Settings(
        "a red apple", "", None, 20, 3.0, 7, 64, 128, pictures=2, loras={"b.safetensors": 0.5}, strength=None
    )
    assert type(settings.num_inference_steps) is int
    assert settings.of_picture(1).seed == 8 and settings.of_picture(1).pictures == 1


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("prompt", "  ", "Prompt: it is empty"),
        ("prompt", None, "Prompt: it is empty"),
        ("prompt", ["x"], "Prompt: expected a text"),
        ("prompt", "x" * 4001, "at most 4000"),
        ("negative_prompt", {"a": 1}, "Negative prompt"),
        ("sampler", "fastest", "Sampler: 'fastest' is not one of ddim, euler"),
        ("num_inference_steps", 0, "Steps: 0, expected a whole number from 1 to 100"),
        ("num_inference_steps", 2.5, "Steps: 2.5"),
        ("num_inference_steps", float("nan"), "Steps: nan"),
        ("num_inference_steps", True, "Steps: True"),
        ("guidance_scale", float("inf"), "Guidance"),
        ("guidance_scale", "7", "Guidance"),
        ("seed", -1, "Seed: -1"),
        ("seed", 2**32, "Seed"),
        ("seed", 10**400, "Seed: 1000"),  # more than a float holds
        ("guidance_scale", -(10**400), "Guidance: -1000"),
        ("seed", None, "Seed: None"),
        ("width", 100, "Width: 100, expected a multiple of 8; the nearest is 96"),
        ("height", 1024, "Height: 1024, expected a whole number from 1 to 512"),
        ("pictures", 5, "Pictures"),
        ("loras", {"../../etc/passwd": 1}, "LoRA: '../../etc/passwd' is not one of a.safetensors"),
        ("loras", {"a.safetensors": 99}, "Weight of a.safetensors"),
        ("loras", ["a.safetensors"], "LoRA: expected"),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, told: str):
    with pytest.raises(ValueError) as error:
        Settings.from_form(LIMITS, **{**FORM, field: value})
    assert told in str(error.value)


def test_strength_counts_where_there_is_a_picture():
    with pytest.raises(ValueError, match="Strength: None"):
        Settings.from_form(LIMITS, **FORM, mode="image")
    assert Settings.from_form(LIMITS, **FORM, mode="image", strength=0.5).strength == 0.5


def test_random_seeds_differ():
    seeds = {Settings.from_form(LIMITS, **{**FORM, "seed": None}, random_seed=True).seed for _ in range(4)}
    assert len(seeds) == 4


def test_what_is_written_comes_back():
    settings = Settings.from_form(LIMITS, **{**FORM, "sampler": "euler", "weighting": True})
    assert from_picture(settings.written(), LIMITS) == {
        "prompt": "a red apple", "sampler": "euler", "num_inference_steps": 20, "guidance_scale": 3.0, "seed": 7,
        "width": 64, "height": 128, "pictures": 2, "weighting": True, "loras": {"b.safetensors": 0.5},
    }  # fmt: skip


def test_a_picture_of_a_batch_comes_back_alone():
    assert from_picture({"prompt": "x", "seed": 5, "pictures": 4, "index": 2}, LIMITS) == {
        "prompt": "x", "seed": 7, "pictures": 1,
    }  # fmt: skip


def test_what_this_page_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"LoRA: '/home/x/c\.safetensors' is not one of"):
        from_picture({"prompt": "x", "loras": {"/home/x/c.safetensors": 1.0}}, LIMITS)
    with pytest.raises(ValueError, match="Width: 100"):
        from_picture({"width": 100}, LIMITS)
