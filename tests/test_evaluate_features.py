"""The networks that look: FID's own, with weights from a file, and a CLIP's picture tower."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from training.evaluate.features import ClipPictures, label, load_features
from training.evaluate.inception import Inception, resized


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """21.8 million random numbers under the names of pytorch-fid's file, with its head."""
    generator, found = torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        like = Inception().state_dict()
    for name, x in sorted(like.items()):
        if name.endswith("conv.weight"):
            found[name] = torch.randn(x.shape, generator=generator) * (2 / x[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            found[name] = 1 + 0.1 * torch.rand(x.shape, generator=generator)
        elif not name.endswith("num_batches_tracked"):
            found[name] = 0.1 * torch.randn(x.shape, generator=generator)
    assert sum(x.numel() for x in found.values()) == 21_785_568 + 2 * 17_216  # parameters, running statistics
    return found | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def test_inception_is_torch_fidelitys(weights, tmp_path):
    """Golden numbers: torch-fidelity 0.4.0's FeatureExtractorInceptionV3 with these weights, of this picture."""
    save_file(weights, tmp_path / "w.safetensors")
    net = load_features(f"inception:{tmp_path / 'w.safetensors'}")
    assert isinstance(net, Inception) and not net.training and not any(p.requires_grad for p in net.parameters())
    ramp = torch.linspace(0, 1, 64)
    picture = torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64), ramp[:, None] * ramp])[None]
    f = net((picture * 255).round().to(torch.uint8))
    assert f.shape == (1, 2048) and f.argmax() == 1907
    assert f.max().item() == pytest.approx(3.5877306, rel=1e-4)
    assert f.sum().item() == pytest.approx(912.46057, rel=1e-4)
    assert f.norm().item() == pytest.approx(32.787319, rel=1e-4)
    assert (f * torch.arange(2048)).sum().item() == pytest.approx(963433.75, rel=1e-4)  # the order matters too
    assert label(f"inception:{tmp_path}/w.safetensors") == "inception"


def test_tensorflows_resize_by_hand():
    """Corner to corner: pixel i of 6 lies at i / 2 of 3, the last half beyond the last pixel."""
    row = torch.tensor([0.0, 10, 40])
    assert resized(row.expand(1, 1, 3, 3), 6)[0, 0, 0].tolist() == [0, 5, 10, 25, 40, 40]
    assert resized(row.expand(1, 1, 3, 3).mT, 6)[0, 0, :, 0].tolist() == [0, 5, 10, 25, 40, 40]
    x = torch.rand(1, 3, 7, 9)
    assert torch.equal(resized(resized(x, 7)[..., :7], 7), resized(x, 7)) and resized(x[..., :1, :1], 4).shape[2:] == (
        4,
        4,
    )
    assert resized(row.expand(1, 1, 3, 3), 2)[0, 0, 0].tolist() == [0, 25]  # not antialiased


def test_a_pickle_is_read_only_where_it_is_allowed(weights, tmp_path):
    some = {k: v for k, v in weights.items() if not k.startswith("Mixed")}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: a pickled checkpoint, .* --allow-pickle"):
        load_features(f"inception:{tmp_path / 'w.pth'}")
    assert isinstance(load_features(f"inception:{tmp_path / 'w.pth'}", allow_pickle=True), Inception)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran")), protocol=2))
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_features(f"inception:{tmp_path / 'bad.pth'}", allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    for others, why in (
        (some, "Mixed_5b.* differs"),
        (weights | {"fc.weight": torch.zeros(1000, 2048)}, "1000 classes, not 1008"),  # as torchvision's
        (weights | {"AuxLogits.fc.weight": torch.zeros(1)}, "AuxLogits.fc.weight differs"),
    ):
        save_file(others, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=rf"not the Inception weights that FID is defined by \({why}\)"):
            load_features(f"inception:{tmp_path / 'other.safetensors'}")


class Payload:
    def __init__(self, file: str):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def test_clip_features_are_the_models_own(tmp_path):
    """transformers' get_image_features of the same pixels, at the tower's own size, where nothing is resized."""
    model = tiny.clip()
    model.save_pretrained(tmp_path)
    net = load_features(f"clip:{tmp_path}")
    assert isinstance(net, ClipPictures) and label(f"clip:{tmp_path}") == f"clip:{tmp_path}"
    pictures = torch.rand(3, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=(pictures - mean) / std)
    expected = theirs if isinstance(theirs, Tensor) else theirs.pooler_output
    assert torch.allclose(net(pictures), expected, atol=2e-3 * expected.abs().max())  # the means have four digits
    assert expected.std(0).max() > 1e-3
    with pytest.raises(ValueError, match=r"no config\.json there"):
        load_features(f"clip:{tmp_path / 'nowhere'}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model type 'bert', expected a CLIPModel's"):
        load_features(f"clip:{tmp_path}")
