"""Discriminators on features and StyleGAN2's: layers, independence of images, state dict."""

import pytest
import torch
import torch.nn.functional as F

from stage1_vqgan.networks import load_network
from stage1_vqgan.networks.feature_discriminator import FeatureDiscriminator
from stage1_vqgan.networks.stylegan_discriminator import StyleGANDiscriminator

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def features():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return FeatureDiscriminator(load_network("timm/test_resnet@32", "random"))


def stylegan():
    torch.manual_seed(0)
    return StyleGANDiscriminator(3, 8, (32, 32))


@pytest.mark.parametrize("build", [features, stylegan])
def test_images_are_judged_alone_and_get_a_gradient(build):
    discriminator = build().eval()
    together = discriminator(IMAGES)
    torch.testing.assert_close(together[1:2], discriminator(IMAGES[1:2]), rtol=1e-4, atol=1e-5)
    images = IMAGES.clone().requires_grad_()
    discriminator(images).mean().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


@pytest.mark.parametrize("build", [features, stylegan])
def test_it_learns_to_tell_noise(build):
    discriminator = build()
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    smooth = F.interpolate(IMAGES[:, :, :4, :4], (32, 32), mode="bilinear")
    for _ in range(12):
        optimizer.zero_grad()
        (F.softplus(-discriminator(smooth)).mean() + F.softplus(discriminator(IMAGES)).mean()).backward()
        optimizer.step()
    discriminator.eval()
    assert discriminator(smooth).mean() > discriminator(IMAGES).mean() + 0.5


def test_every_feature_map_counts_the_same():
    discriminator = features().eval()
    maps = discriminator.network(IMAGES).features
    alone = [head(found).mean((1, 2, 3)) for head, found in zip(discriminator.heads, maps, strict=True)]
    assert [found.shape[-1] for found in maps] == [16, 8, 4, 2, 1]
    assert discriminator(IMAGES).shape == (4, 5, 16, 16)
    torch.testing.assert_close(discriminator(IMAGES).mean((1, 2, 3)), torch.stack(alone).mean(0))


def test_a_head_is_that_of_stylegan_t():
    discriminator = features().eval()
    first, residual, last = discriminator.heads[1]
    x = discriminator.network(IMAGES).features[1]

    def block(layers, x, padding):
        conv, norm, _ = layers
        x = F.conv2d(F.pad(x, (padding,) * 4, "circular") if padding else x, conv.weight, conv.bias)
        return F.leaky_relu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias), 0.2)

    x = block(first, x, 0)
    x = (x + block(residual.function, x, 1)) / 2**0.5
    torch.testing.assert_close(discriminator.heads[1](discriminator.network(IMAGES).features[1]), last(x))


def test_spectral_norm_bounds_the_weights():
    discriminator = features()
    for _ in range(30):  # of power iterations, one in each forward
        discriminator(IMAGES[:1])
    weight = discriminator.heads[2][1].function[0].weight.detach()
    torch.testing.assert_close(torch.linalg.matrix_norm(weight.flatten(1), 2), torch.tensor(1.0), rtol=0.05, atol=0)


def test_the_frozen_network_is_not_in_the_state_dict():
    discriminator, other = features(), features()
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    torch.nn.init.ones_(other.heads[0][2].bias)
    other.load_state_dict(discriminator.state_dict())
    torch.testing.assert_close(other.eval()(IMAGES), discriminator.eval()(IMAGES))
    half = discriminator.double()
    assert next(half.network.parameters()).dtype == torch.float64 and not half.train().network.training


@pytest.mark.parametrize("shape, blocks", [((32, 32), 3), ((16, 16), 2), ((24, 40), 3), ((32, 64), 3)])
def test_stylegan_blocks_follow_the_image_size(shape, blocks):
    discriminator = StyleGANDiscriminator(1, 4, shape)
    convolutions = [layer for layer in discriminator.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == 3 * blocks + 2
    assert discriminator(torch.zeros(2, 1, *shape)).shape == (2, 1, 1, 1)


def test_stylegan_block_against_flax_layers_written_out():
    block = stylegan().main[2]
    x = torch.randn(2, 8, 6, 7, generator=torch.Generator().manual_seed(1))

    def blur(x):  # "SAME" padding of a filter of four taps
        taps = torch.tensor([1, 3, 3, 1]) / 8
        padded = F.pad(x, (1, 2, 1, 1))
        rows = sum(taps[i] * padded[:, :, i : i + 6 : 2][:, :, :3] for i in range(4))
        return sum(taps[i] * rows[..., i : i + 8 : 2][..., :4] for i in range(4))

    inner = F.leaky_relu(block.second(blur(F.leaky_relu(block.first(x), 0.2))), 0.2)
    torch.testing.assert_close(block(x), (block.skip(blur(x)) + inner) / 2**0.5)
