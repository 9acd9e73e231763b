"""The PatchGAN discriminator: shape, widths and initialisation of the original, and its stored numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stage1_vqgan.discriminator import PatchDiscriminator, logit_grid_size
from stage1_vqgan.losses import discriminator_hinge_loss

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "losses.safetensors"


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [16, 17, 28, 31, 32, 64, 100])
def test_logit_grid_size(size, num_layers):
    with torch.device("meta"):
        discriminator, images = PatchDiscriminator(1, 4, num_layers).eval(), torch.empty(1, 1, size, size)
    expected = logit_grid_size(size, num_layers)
    if expected < 1:
        with pytest.raises(RuntimeError):
            discriminator(images)
    else:
        assert discriminator(images).shape == (1, 1, expected, expected)


@pytest.mark.parametrize("norm_type, norm", [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
@pytest.mark.parametrize("num_layers, widths", [(1, [8, 16]), (3, [8, 16, 32, 64]), (5, [8, 16, 32, 64, 64, 64])])
def test_layers(num_layers, widths, norm_type, norm):
    layers = list(PatchDiscriminator(3, 8, num_layers, norm_type).main)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    strides = [2] * num_layers + [1, 1]
    for conv, before, after, stride in zip(convolutions, [3, *widths], [*widths, 1], strides, strict=True):
        assert (conv.in_channels, conv.out_channels) == (before, after)
        assert (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (stride, stride), (1, 1))
    assert [conv.bias is not None for conv in convolutions] == [True] + [False] * num_layers + [True]
    activations = [layer for layer in layers if isinstance(layer, nn.LeakyReLU)]
    assert [a.negative_slope for a in activations] == [0.2] * (num_layers + 1)
    assert sum(isinstance(layer, norm) for layer in layers) == num_layers
    assert len(layers) == 3 * num_layers + 3


@pytest.mark.parametrize("norm_type", ["batch", "group"])
def test_initialisation(norm_type):
    torch.manual_seed(0)
    for layer in PatchDiscriminator(3, 64, 2, norm_type).main:
        if isinstance(layer, nn.LeakyReLU):
            continue
        mean, tolerance = (0.0, 0.1) if isinstance(layer, nn.Conv2d) else (1.0, 0.3)
        weight = layer.weight.detach()
        assert weight.mean().item() == pytest.approx(mean, abs=0.005)
        assert weight.std().item() == pytest.approx(0.02, rel=tolerance)
        if layer.bias is not None:
            assert layer.bias.detach().eq(0).all()


def test_group_norm_does_not_see_the_other_images():
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(3, 8, 2, "group"), torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]))


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"{GOLDEN} is not there")
def test_logits_statistics_and_gradient_of_the_original():
    golden = load_file(GOLDEN)
    images = {"real": golden["io.input"], "fake": golden["io.recon"]}
    discriminator = PatchDiscriminator(3, 32, 3)
    discriminator.load_state_dict({k.removeprefix("disc."): v for k, v in golden.items() if k.startswith("disc.")})
    discriminator.eval()
    for name, batch in images.items():
        torch.testing.assert_close(discriminator(batch), golden[f"disc_eval.{name}"], atol=1e-5, rtol=1e-4)

    discriminator.train()
    discriminator(images["fake"])  # the generator's pass comes first
    logits = {name: discriminator(batch) for name, batch in images.items()}
    for name, value in logits.items():
        torch.testing.assert_close(value, golden[f"disc_train.{name}"], atol=1e-5, rtol=1e-4)
    state = discriminator.state_dict()
    statistics = {k.removeprefix("after_gd."): v for k, v in golden.items() if k.startswith("after_gd.")}
    assert len(statistics) == 9
    for key, value in statistics.items():
        torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4)

    discriminator_hinge_loss(logits["real"], logits["fake"]).backward()
    gradient, expected = discriminator.main[0].weight.grad, golden["grad.disc.main.0.weight"]
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()
