"""The autoencoder's losses and its critic, against closed forms."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from ldm.models.discriminator import PatchDiscriminator
from ldm.models.vae import VAE
from training import losses

VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2, image_size=16, patch_size=8
)


def clip(**kw) -> CLIPModel:
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION | kw), projection_dim=8))


def test_reconstruction_by_hand():
    x = torch.zeros(2, 3, 2, 2)
    y = torch.stack([torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), -2.0)])
    assert losses.reconstruction(y, x, "l1").tolist() == [0.5, 2.0]
    assert losses.reconstruction(y, x, "l2").tolist() == [0.25, 4.0]
    with pytest.raises(ValueError, match="'l1' or 'l2'"):
        losses.reconstruction(y, x, "huber")  # type: ignore[arg-type]


def test_hinge_by_hand():
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # max(0, 1 - real) = 0, 1/2, 2; max(0, 1 + made) = 0, 1, 2
    assert losses.hinge_critic(real, made).item() == pytest.approx(0.5 * (2.5 / 3 + 1.0))
    assert losses.hinge_generator(made).item() == pytest.approx(2 / 3)


def test_adaptive_weight_by_hand():
    # y = w x: d/dw of 3 w x is 3 x, of -w² x is -2 w x; |.| over the two weights.
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.tensor([4.0, 3.0])
    rec, gan = (3 * w * x).sum(), -(w.square() * x).sum()
    weight = losses.adaptive_weight(rec, gan, w)
    assert weight.item() == pytest.approx(15.0 / (8**2 + 12**2) ** 0.5, rel=1e-6)
    assert not weight.requires_grad
    assert w.grad is None
    (rec + weight * gan).backward()  # both graphs are still there
    torch.testing.assert_close(w.grad, 3 * x - weight * 2 * w.detach() * x)
    # No gradient from the critic: the ratio is 15 / 1e-6, the clamp holds.
    assert losses.adaptive_weight((3 * w * x).sum(), (0 * w).sum(), w).item() == 1e4
    assert losses.adaptive_weight((3 * w * x).sum(), (0 * w).sum(), w, largest=5.0).item() == 5.0


def test_adaptive_weight_is_the_mean_of_the_processes(tmp_path):
    script = f"""
import sys, torch, torch.distributed as dist
from training.losses import adaptive_weight
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
w = torch.ones(1, requires_grad=True)
print(adaptive_weight((2 + 4 * rank) * w.sum(), w.sum(), w).item())
dist.destroy_process_group()
"""
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    weights = [float(p.communicate(timeout=120)[0]) for p in both]
    assert weights[0] == weights[1]
    assert weights[0] == pytest.approx((2 + 6) / 2, rel=1e-5)  # the 1e-6 beside the norm


def test_each_player_leaves_the_other_alone():
    torch.manual_seed(0)
    vae = VAE(block_out_channels=(8, 8), norm_num_groups=4)
    critic = PatchDiscriminator(channels=4, layers=2)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    y, _ = vae(x, torch.randn(2, 4, 8, 8))

    losses.critic_loss(critic, x, y).backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for p in vae.parameters())

    critic.zero_grad()
    gan = losses.generator_loss(critic, y)
    weight = losses.adaptive_weight(losses.reconstruction(y, x).mean(), gan, vae.last_layer)
    (losses.reconstruction(y, x).mean() + weight * gan).backward()
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert all(p.grad is not None for p in vae.parameters())
    # As if the critic's weights had been watched too.
    truth = torch.autograd.grad(-critic(y_ := y.detach().requires_grad_()).mean(), y_)[0]
    ours = torch.autograd.grad(losses.generator_loss(critic, y_), y_)[0]
    assert torch.equal(truth, ours)


def test_critic_wins_where_it_can():
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=8, layers=2)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    y = nn.functional.avg_pool2d(x, 3, 1, 1)  # what an l2 autoencoder makes of noise: a blur
    assert losses.critic_loss(critic, x, y).item() == pytest.approx(1.0, abs=0.1)  # logits near 0: it knows nothing
    for _ in range(40):
        optimizer.zero_grad()
        losses.critic_loss(critic, x, y).backward()
        optimizer.step()
    assert losses.critic_loss(critic, x, y).item() < 0.3


def test_critic_shape_start_and_independence_of_the_batch():
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=32, layers=3)
    x = torch.randn(3, 3, 32, 40)
    logits = critic(x)
    assert logits.shape == (3, 1, 2, 3)
    torch.testing.assert_close(logits[1:2], critic(x[1:2]))
    assert [m.stride[0] for m in critic.modules() if isinstance(m, nn.Conv2d)] == [2, 2, 2, 1, 1]
    widest = max((m for m in critic.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
    assert widest.weight.std().item() == pytest.approx(0.02, rel=0.01)  # half a million draws: within 0.1%
    # 70 pixels (Isola et al. 2017): where one logit has a gradient. Without norms, which see the whole picture.
    x = torch.zeros(1, 3, 96, 96, requires_grad=True)
    logits = PatchDiscriminator(channels=4, layers=3, norm="none")(x)
    logits[0, 0, 5, 5].backward()
    assert x.grad is not None
    rows = x.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_picture_of_the_critic(layers):
    critic = PatchDiscriminator(channels=4, layers=layers)
    n = critic.smallest
    assert critic(torch.zeros(1, 3, n, n)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"smaller than {n} by {n}"):
        critic(torch.zeros(1, 3, n, n - 1))


def test_bad_critic_is_refused():
    with pytest.raises(ValueError, match="'group' or 'none'"):
        PatchDiscriminator(norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 layers"):
        PatchDiscriminator(layers=0)


def test_clip_distance_gradients_and_bounds(tmp_path):
    clip().save_pretrained(tmp_path)
    distance: Any = losses.perceptual(f"clip:{tmp_path}").train()
    assert not distance.tower.training
    assert distance.depths == [1, 2, 4, 5]
    x = torch.rand(2, 3, 32, 32) * 2 - 1  # twice the tower's size
    y = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    x.requires_grad_()
    d = distance(y, x)
    assert d.shape == (2,)
    assert ((d > 0) & (d < 4)).all()
    d.sum().backward()
    assert y.grad is not None and (y.grad != 0).float().mean() > 0.99
    assert x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())
    assert distance(x, x).tolist() == [0.0, 0.0]
    assert not distance.state_dict().keys() - {f"tower.{k}" for k in distance.tower.state_dict()}
    # Unit states: |a - b|² = 2 - 2 cos, averaged over tokens and layers; the tower's input by the published numbers.
    small = x.detach()[..., ::2, ::2], y.detach()[..., ::2, ::2]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (losses.CLIP_MEAN, losses.CLIP_STD))
    states = [clip().vision_model((0.5 * v + 0.5 - mean) / std, output_hidden_states=True).hidden_states for v in small]
    truth = [2 - 2 * torch.cosine_similarity(states[0][i], states[1][i], dim=-1).mean(1) for i in (1, 2, 4, 5)]
    torch.testing.assert_close(distance(*small), torch.stack(truth).mean(0), rtol=1e-4, atol=1e-6)


def test_clip_distance_of_a_vision_folder_with_its_own_normalisation(tmp_path):
    tower = clip().vision_model
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
    )
    distance: Any = losses.perceptual(f"clip:{tmp_path}")
    assert distance.mean.flatten().tolist() == [0.5] * 3
    assert distance.std.flatten().tolist() == [0.25] * 3
    assert type(distance.tower) is type(tower)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vgg", "expected 'lpips', or 'clip:FOLDER'"),
        ("clip:", "expected 'lpips', or 'clip:FOLDER'"),
        ("clip:nowhere", "there is no nowhere/config.json"),
    ],
)
def test_unknown_perceptual_source_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        losses.perceptual(source)


def test_a_folder_that_is_no_clip_or_lacks_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        losses.perceptual(f"clip:{tmp_path}")
    whole = clip()
    state = {k: v for k, v in whole.state_dict().items() if "vision_model.encoder.layers.2" not in k}
    whole.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 16 weights, the first is vision_model\.encoder\.layers\.2"):
        losses.perceptual(f"clip:{tmp_path}")


def test_lpips_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"cannot be imported .* or use 'clip:FOLDER'"):
        losses.perceptual("lpips")


def test_lpips_is_called_in_its_own_range(monkeypatch):
    class LPIPS(nn.Module):  # stands in for the package's class: its signature, inputs in [-1, 1], (B, 1, 1, 1) out
        def __init__(self, net, verbose):
            super().__init__()
            assert (net, verbose) == ("vgg", False)
            self.lin = nn.Linear(1, 1)

        def forward(self, y, x):
            return self.lin.weight.square() * (y - x).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    distance: Any = losses.perceptual("lpips").train()
    assert not distance.net.training
    y, x = torch.ones(2, 3, 4, 4, requires_grad=True), -torch.ones(2, 3, 4, 4, requires_grad=True)
    d = distance(y, x)
    torch.testing.assert_close(d, 4 * distance.net.lin.weight.square().expand(2, 1).flatten())
    d.sum().backward()
    assert y.grad is not None
    assert not any(p.requires_grad for p in distance.parameters())
