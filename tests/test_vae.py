"""The autoencoder against its stock twin, with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from ldm.latents import LatentScale
from ldm.models.vae import VAE, Moments

SD: dict[str, Any] = dict(block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4)
NO_QUANT: dict[str, Any] = dict(use_quant_conv=False, use_post_quant_conv=False)
FORMS: dict[str, dict[str, Any]] = {
    "sd": SD,
    "sdxl": SD | dict(scaling_factor=0.13025, sample_size=1024, force_upcast=True),
    "sd3": SD | NO_QUANT | dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
    "flux": SD | NO_QUANT | dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
    "one_level": dict(block_out_channels=(8,), norm_num_groups=2, force_upcast=False),
    "four_levels": dict(block_out_channels=(4, 4, 8, 12), norm_num_groups=2, latent_channels=2, sample_size=(32, 48)),
    "no_attention": SD | dict(mid_block_add_attention=False),
    "grey": SD | dict(in_channels=1, out_channels=2, use_post_quant_conv=False),
}


def stock(form: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    levels = len(FORMS[form]["block_out_channels"])
    blocks: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels
    )
    model: Any = AutoencoderKL(**FORMS[form], **blocks)
    for p in model.parameters():  # biases and norms away from 0 and 1, where a mix-up would not show
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def worst(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None and b is not None
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("form", FORMS)
# float32 differs by the order of sums over a few thousand terms; float64 shows that it is only that.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_outputs_and_gradients_are_those_of_the_twin(form, dtype, tolerance):
    twin = stock(form, dtype)
    ours = VAE.from_diffusers(stock(form, dtype))  # an equal one, so that gradients do not run together
    x = torch.randn(2, twin.config.in_channels, 16, 24, dtype=dtype)
    eps = torch.randn(2, twin.config.latent_channels, 16 // ours.factor, 24 // ours.factor, dtype=dtype)
    x_twin, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()

    q = twin.encode(x_twin).latent_dist
    y_twin = twin.decode(q.mean + q.std * eps).sample
    y_ours, moments = ours(x_ours, eps)
    assert worst(moments.mean, q.mean) < tolerance
    assert worst(moments.log_var, q.logvar) < tolerance
    assert worst(y_ours, y_twin) < tolerance
    assert worst(moments.kl(), q.kl()) < tolerance

    weight = torch.randn_like(y_twin)
    ((y_twin * weight).sum() + q.kl().sum()).backward()
    ((y_ours * weight).sum() + moments.kl().sum()).backward()
    assert worst(x_ours.grad, x_twin.grad) < tolerance
    of_twin = {name: p.grad for name, p in twin.named_parameters()}
    # Where the true gradient is a cancelling sum (0 for a key's bias), what differs is its terms' rounding.
    floor = 0.01 * max(g.abs().max().item() for g in of_twin.values() if g is not None)
    for name, p in ours.named_parameters():
        g = of_twin[name]
        assert g is not None and p.grad is not None
        assert ((p.grad - g).abs().max() / g.abs().max().clamp_min(floor)).item() < tolerance, name


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_shares_storage_and_keeps_the_config(form):
    twin = stock(form)
    ours = VAE.from_diffusers(twin)
    back = ours.to_diffusers()
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in twin.config.items() if not k.startswith("_")}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in back.config.items() if k in plain} == plain
    for state in (ours.state_dict(), back.state_dict()):
        assert {k: v.data_ptr() for k, v in state.items()} == {k: v.data_ptr() for k, v in twin.state_dict().items()}


def test_folder_round_trip(tmp_path):
    ours = VAE(block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4)
    ours.set_latent_scale(LatentScale(0.7, -0.25))
    ours.to_diffusers().save_pretrained(tmp_path / "vae")
    again = VAE.from_diffusers(tmp_path / "vae")
    assert again.latent_scale == LatentScale(0.7, -0.25)
    assert again.config == ours.config
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(again.encode(x).mean, ours.encode(x).mean)


FULL: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
SIXTEEN: dict[str, Any] = FULL | NO_QUANT | dict(latent_channels=16, sample_size=1024, force_upcast=True)
PUBLISHED: dict[str, tuple[dict[str, Any], int, LatentScale]] = {
    "stabilityai/sd-vae-ft-mse": (FULL | dict(sample_size=256), 83_653_863, LatentScale(0.18215, 0.0)),
    "stabilityai/sdxl-vae": (
        FULL | dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        83_653_863,
        LatentScale(0.13025, 0.0),
    ),
    "stabilityai/stable-diffusion-3-medium": (
        SIXTEEN | dict(scaling_factor=1.5305, shift_factor=0.0609),
        83_819_683,
        LatentScale(1.5305, 0.0609),
    ),
    "black-forest-labs/FLUX.1-dev": (
        SIXTEEN | dict(scaling_factor=0.3611, shift_factor=0.1159),
        83_819_683,
        LatentScale(0.3611, 0.1159),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_names_shapes_and_size_of_the_twin(name):
    config, size, scale = PUBLISHED[name]
    with torch.device("meta"):
        ours, twin = VAE(**config), AutoencoderKL(**config)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in twin.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == size
    assert ours.factor == 8
    assert ours.latent_scale == scale


def test_moments_against_torch_distributions():
    torch.manual_seed(0)
    moments = Moments(torch.randn(3, 4, 2, 2).double(), torch.randn(3, 4, 2, 2).double())
    q = torch.distributions.Normal(moments.mean, (0.5 * moments.log_var).exp())
    truth = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(moments.kl(), truth, rtol=1e-12, atol=0)
    eps = torch.randn(3, 4, 2, 2).double()
    torch.testing.assert_close(moments.sample(eps), q.icdf(torch.distributions.Normal(0.0, 1.0).cdf(eps)))
    # In half precision the sum of 4096 terms of 50 would be infinite (largest float16: 65504).
    ten = torch.full((1, 4, 32, 32), 10.0, dtype=torch.float16)
    assert Moments(ten, 0 * ten).kl().item() == 4096 * 50.0


def test_log_var_is_clamped_as_in_stock():
    vae = VAE(block_out_channels=(8,), norm_num_groups=2, latent_channels=1)
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    for bias, bound in [(1e4, 20.0), (-1e4, -30.0)]:
        torch.nn.init.constant_(vae.quant_conv.bias, bias)
        assert (vae.encode(torch.zeros(1, 3, 4, 4)).log_var == bound).all()


def kept(loss: Any) -> int:
    """Numbers that autograd keeps for the backward pass, parameters aside."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    held: Any = []  # storages that die would give their address to others
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), pack(t))[1], lambda t: t):
        loss()
    return sum(seen.values())


def test_gradient_checkpointing_changes_nothing_but_the_memory():
    torch.manual_seed(0)
    vae = VAE(**SD)
    x, eps = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    grads, memory = [], []
    for on in (False, True):
        vae.enable_gradient_checkpointing() if on else vae.disable_gradient_checkpointing()
        vae.zero_grad()
        vae(x, eps)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
        memory.append(kept(lambda: vae(x, eps)[0].square().mean()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert memory[1] < 0.4 * memory[0]  # a block's input is kept in place of its input, two norms and two activations


def test_no_more_is_kept_for_the_backward_pass_than_by_the_twin():
    twin = stock("sd")
    ours = VAE.from_diffusers(twin)
    x, eps = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
    of_twin = kept(lambda: twin.decode(twin.encode(x).latent_dist.mean + eps).sample.mean())
    assert kept(lambda: ours(x, eps)[0].mean()) <= of_twin


def test_channels_last_gives_the_same():
    ours = VAE.from_diffusers(stock("sd"))
    x, eps = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 4, 6)
    outputs, grads = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours = ours.to(memory_format=memory_format)  # type: ignore[call-overload]
        ours.zero_grad()
        y, _ = ours(x.contiguous(memory_format=memory_format), eps)
        y.square().mean().backward()
        outputs.append(y.detach())
        grads.append(torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert worst(*outputs) < 1e-5  # other kernels, other order of sums
    assert worst(*grads) < 1e-5


def test_slicing_gives_the_same():
    ours = VAE.from_diffusers(stock("flux"))
    x, eps = torch.randn(3, 3, 16, 24), torch.randn(3, 16, 4, 6)
    whole, moments = ours(x, eps)
    ours.enable_slicing()
    rows = []
    ours.decoder.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    again, of_rows = ours(x, eps)
    assert rows == [1, 1, 1]
    # Kernels are chosen by the batch's size, so the order of sums may differ.
    assert worst(again, whole) < 1e-5
    assert worst(of_rows.mean, moments.mean) < 1e-5
    ours.disable_slicing()
    assert torch.equal(ours(x, eps)[0], whole)
    assert rows[3:] == [3]


def test_inference_follows_the_weights_at_once():
    # The folded kernel of the upsampling must be that of the weights as they are now, however they were changed.
    ours, z = VAE.from_diffusers(stock("sd")), torch.randn(1, 4, 4, 4)

    def check() -> None:
        with torch.no_grad():
            assert worst(ours.decode(z), ours.to_diffusers().decode(z).sample) < 1e-5

    check()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)
    ours.decode(z).square().mean().backward()
    optimizer.step()
    check()
    for p in ours.parameters():
        p.data.mul_(1.1)  # leaves the version counter as it is
    check()


def test_start_keeps_the_signal_and_every_parameter_learns():
    torch.manual_seed(0)
    vae = VAE(block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in vae.named_parameters()}
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    losses = []
    for _ in range(4):
        y, moments = vae(x, torch.randn(4, 4, 4, 4))
        loss = (y - x).square().mean() + 1e-6 * moments.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 2.0  # a picture of uniform noise has variance 1/3: nothing explodes at the start
    assert losses[-1] < losses[0]
    assert not [n for n, p in vae.named_parameters() if torch.equal(p, before[n])]


@pytest.mark.parametrize(("size", "nearest"), [((16, 18), "16 by 20"), ((17, 16), "16 by 16"), ((1, 16), "4 by 16")])
def test_a_size_that_does_not_fit_names_the_nearest(size, nearest):
    vae = VAE(**SD)
    with pytest.raises(ValueError, match=f"factor 4; the nearest size that fits is {nearest}"):
        vae.encode(torch.zeros(1, 3, *size))


def test_channels_of_another_model_are_named():
    vae = VAE(**SD)
    with pytest.raises(ValueError, match=r"latents of shape \(1, 16, 4, 4\).*latent_channels=4"):
        vae.decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match=r"picture of shape \(1, 4, 16, 16\).*in_channels=3"):
        vae.encode(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"picture of shape \(3, 16, 16\)"):
        vae.encode(torch.zeros(3, 16, 16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(block_out_channels=(8, 10), norm_num_groups=4), "10 is not a multiple of norm_num_groups=4"),
        (dict(block_out_channels=()), "block_out_channels is empty"),
        (dict(block_out_channels=(32, 32), down_block_types=("AttnDownEncoderBlock2D",) * 2), "DownEncoderBlock2D"),
        (dict(block_out_channels=(32, 32), up_block_types=("UpDecoderBlock2D",)), "each of the 2 levels"),
    ],
)
def test_bad_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        VAE(**config)


def test_what_ours_does_not_do_is_refused():
    with pytest.raises(ValueError, match="act_fn='relu'"):
        VAE.from_diffusers(AutoencoderKL(block_out_channels=(32,), act_fn="relu"))
    with pytest.raises(ValueError, match="latents_mean"):
        VAE.from_diffusers(AutoencoderKL(block_out_channels=(32,), latent_channels=1, latents_mean=(0.5,)))
    with pytest.raises(ValueError, match="scale > 0"):
        VAE(block_out_channels=(32,)).set_latent_scale(LatentScale(float("inf"), 0.0))


def test_a_pickle_is_read_only_when_asked_for(tmp_path: Path) -> None:
    theirs = stock(next(iter(FORMS)))
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert [f.suffix for f in tmp_path.glob("diffusion_pytorch_model*")] == [".bin"]
    with pytest.raises(OSError, match="safetensors"):
        VAE.from_diffusers(tmp_path)
    ours = VAE.from_diffusers(tmp_path, use_safetensors=False)
    assert torch.equal(ours.state_dict()["decoder.conv_out.weight"], theirs.state_dict()["decoder.conv_out.weight"])
