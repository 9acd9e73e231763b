"""The PatchGAN discriminator: shape, widths and initialisation of the original, and its forward written out.

The original's stored numbers are in test_losses.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stage1_vqgan.training.discriminator import ActNorm, PatchDiscriminator
from stage1_vqgan.training.discriminator_config import logit_grid_size
from tests.devices import on_device

pytestmark = on_device


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


@pytest.mark.parametrize("norm_type, norm", [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("actnorm", ActNorm)])
@pytest.mark.parametrize("num_layers, widths", [(1, [8, 16]), (3, [8, 16, 32, 64]), (5, [8, 16, 32, 64, 64, 64])])
def test_layers(num_layers, widths, norm_type, norm):
    layers = list(PatchDiscriminator(3, 8, num_layers, norm_type).main)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    strides = [2] * num_layers + [1, 1]
    for conv, before, after, stride in zip(convolutions, [3, *widths], [*widths, 1], strides, strict=True):
        assert (conv.in_channels, conv.out_channels) == (before, after)
        assert (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (stride, stride), (1, 1))
    assert [conv.bias is not None for conv in convolutions] == [True] + [norm is ActNorm] * num_layers + [True]
    activations = [layer for layer in layers if isinstance(layer, nn.LeakyReLU)]
    assert [a.negative_slope for a in activations] == [0.2] * (num_layers + 1)
    assert sum(isinstance(layer, norm) for layer in layers) == num_layers
    assert len(layers) == 3 * num_layers + 3


@pytest.mark.parametrize("norm_type", ["batch", "group", "actnorm"])
def test_initialisation(norm_type):
    torch.manual_seed(0)
    for layer in PatchDiscriminator(3, 64, 2, norm_type).main:
        if isinstance(layer, nn.LeakyReLU | ActNorm):
            continue
        mean, tolerance = (0.0, 0.1) if isinstance(layer, nn.Conv2d) else (1.0, 0.3)
        weight = layer.weight.detach()
        assert weight.mean().item() == pytest.approx(mean, abs=0.005)
        assert weight.std().item() == pytest.approx(0.02, rel=tolerance)
        if layer.bias is not None:
            assert layer.bias.detach().eq(0).all()


@pytest.mark.parametrize("norm_type", ["group", "actnorm"])
def test_an_image_does_not_see_the_others(norm_type):
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(3, 8, 2, norm_type), torch.randn(3, 3, 16, 16)
    discriminator(images)  # initialises ActNorm
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]))


def moments(x):
    """Mean and variance of each channel over batch and positions, the variance biased, by hand."""
    flat = x.transpose(0, 1).flatten(1)
    mean = flat.sum(1) / flat.shape[1]
    return mean, (flat - mean[:, None]).square().sum(1) / flat.shape[1], flat.shape[1]


def written_out(state, x, norm_type, training):
    """Logits of a discriminator of two layers, from its state dict, which gets the statistics of a batch."""
    x = F.conv2d(x, state["main.0.weight"], state["main.0.bias"], stride=2, padding=1)
    x = torch.where(x > 0, x, 0.2 * x)
    for conv, norm, stride in (("main.2", "main.3", 2), ("main.5", "main.6", 1)):
        x = F.conv2d(x, state[f"{conv}.weight"], state.get(f"{conv}.bias"), stride=stride, padding=1)
        mean, variance, count = moments(x.detach() if norm_type == "actnorm" else x)
        if norm_type == "batch":
            if training:
                unbiased = variance.detach() * count / (count - 1)
                for name, value in (("mean", mean.detach()), ("var", unbiased)):
                    running = state[f"{norm}.running_{name}"]
                    running.copy_(0.9 * running + 0.1 * value)
            else:
                mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
            x = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
            x = x * state[f"{norm}.weight"].view(-1, 1, 1) + state[f"{norm}.bias"].view(-1, 1, 1)
        else:
            if training and not state[f"{norm}.initialized"]:
                deviation = (variance * count / (count - 1)).sqrt()
                state[f"{norm}.loc"].data.copy_(-mean.view(1, -1, 1, 1))
                state[f"{norm}.scale"].data.copy_((1 / (deviation + 1e-6)).view(1, -1, 1, 1))
                state[f"{norm}.initialized"].fill_(1)
            x = state[f"{norm}.scale"] * (x + state[f"{norm}.loc"])
        x = torch.where(x > 0, x, 0.2 * x)
    return F.conv2d(x, state["main.8.weight"], state["main.8.bias"], padding=1)


@pytest.mark.parametrize("norm_type", ["batch", "actnorm"])
def test_logits_statistics_and_gradients_written_out(norm_type):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(2, 4, 2, norm_type)
    reference = {name: value.clone() for name, value in discriminator.state_dict().items()}
    parameters = dict(discriminator.named_parameters())
    for name in parameters:
        reference[name].requires_grad_()
    for call, training in enumerate((False, True, True, False)):
        images = torch.randn(3, 2, 16, 16) * (call + 1) + call
        found = discriminator.train(training)(images)
        expected = written_out(reference, images, norm_type, training)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for part in (found, expected):
            part.square().mean().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad, reference[name].grad, atol=1e-4, rtol=1e-4, msg=name)
    for name, value in discriminator.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(value, reference[name].detach(), atol=1e-6, rtol=1e-5, msg=name)


def test_actnorm_starts_with_the_first_training_batch_alone():
    layer, x = ActNorm(3), torch.randn(4, 3, 5, 5) * 3 + 2
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert torch.equal(layer.eval()(x), x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())

    out = layer.train()(x)
    assert out.mean((0, 2, 3)).abs().max() < 1e-5 and (out.std((0, 2, 3)) - 1).abs().max() < 1e-5
    settled = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(10 * x)
    for other in (layer, copy.deepcopy(layer)):
        other.train()(20 * x)
        assert all(torch.equal(settled[name], value) for name, value in other.state_dict().items())
    assert settled["initialized"].dtype == torch.uint8 and settled["loc"].shape == (1, 3, 1, 1)

    loaded = ActNorm(3)
    loaded.load_state_dict(settled)
    torch.testing.assert_close(loaded.train()(x), out)
    loaded.load_state_dict(before)  # this state is not initialised, so the next batch initialises ActNorm
    torch.testing.assert_close(loaded(10 * x), out, atol=1e-5, rtol=1e-5)
