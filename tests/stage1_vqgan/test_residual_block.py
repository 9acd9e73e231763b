"""A residual block, compared with calls of its single layers, and the tensors that it saves for the backward."""

import copy

import pytest
import torch
import torch.nn.functional as F

from stage1_vqgan import VQGANConfig
from stage1_vqgan.modeling_blocks import ResidualBlock
from tests.devices import DEVICE, on_device

pytestmark = on_device


def make(in_channels=8, out_channels=12, **config):
    torch.manual_seed(0)
    block = ResidualBlock(VQGANConfig(norm_num_groups=4, **config), in_channels, out_channels)
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.weight.normal_(1.0, 0.3)
            norm.bias.normal_()
    return block, torch.randn(2, in_channels, 6, 5)


def layer_by_layer(block, x):
    h = block.conv1(F.silu(block.norm1(x)))
    return block.nin_shortcut(x) + block.conv2(F.silu(block.norm2(h)))


def gradients(function, block, x, **autocast):
    block, x = copy.deepcopy(block), x.clone().requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16, **autocast):
        out = function(block, x)
    out.float().square().sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_output_and_gradients_are_those_of_its_layers(out_channels, mixed, memory_format):
    block, x = make(out_channels=out_channels)
    block.to(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    found = gradients(ResidualBlock.__call__, block, x, enabled=mixed)
    expected = gradients(layer_by_layer, block, x, enabled=mixed)
    assert found.keys() == expected.keys() and torch.equal(found["out"], expected["out"])
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and value.abs().max() > 0
        torch.testing.assert_close(found[name], value, rtol=1e-2 if mixed else 1e-5, atol=1e-2 if mixed else 1e-5)


def test_only_the_inputs_of_its_two_halves_are_kept():
    block, x = make(out_channels=8)
    x.requires_grad_()
    kept, known = {}, {parameter.data_ptr() for parameter in block.parameters()}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x)
    images = [tensor for pointer, tensor in kept.items() if pointer not in known and tensor.numel() >= x.numel()]
    assert len(images) == 2 and any(tensor.data_ptr() == x.data_ptr() for tensor in images)
    assert out.grad_fn is not None


def test_dropout_and_layers_put_in_place_of_its_own_act():
    block, x = make(out_channels=8, dropout=0.5)
    assert not torch.equal(block(x), block(x)) and torch.equal(block.eval()(x), block(x))
    before = block(x)
    block.conv2 = torch.nn.Sequential(block.conv2, torch.nn.Conv2d(8, 8, 1))
    assert not torch.allclose(block(x), before)


def test_a_second_derivative_is_refused():
    block, x = make()
    (gradient,) = torch.autograd.grad(block(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
