"""The vector quantizer, compared with a double loop and gradients derived by hand."""

import pytest
import torch

from stage1_vqgan import quantizer_base
from stage1_vqgan.quantizers import CodebookQuantizer, build_quantizer, nearest_code
from tests.devices import DEVICE, on_device

pytestmark = on_device

K, D = 11, 5


def make(l2_normalize=False, legacy=False, beta=0.25, codes=K):
    torch.manual_seed(0)
    options = {"l2_normalize": l2_normalize, "commitment_cost": beta, "legacy_codebook_loss": legacy}
    quantizer = build_quantizer("vq", codes, D, options)
    torch.nn.init.uniform_(quantizer.embedding.weight, -1 / codes, 1 / codes)
    latents = torch.randn(2, D, 3, 4, requires_grad=True)
    return quantizer, latents


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def through_unit(v, gradient):
    """The gradient with respect to v of a function of v / ‖v‖."""
    u = unit(v)
    return (gradient - u * (u * gradient).sum(-1, keepdim=True)) / v.norm(dim=-1, keepdim=True)


def as_rows(grid):
    return grid.permute(0, 2, 3, 1).reshape(-1, D)


def naive_codes(rows, codebook):
    codes = []
    for z in rows.double():
        distances = [float(((z - e) ** 2).sum()) for e in codebook.double()]
        codes.append(distances.index(min(distances)))
    return torch.tensor(codes)


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_codes_are_the_nearest_entries(l2_normalize):
    quantizer, latents = make(l2_normalize)
    rows, codebook = as_rows(latents.detach()), quantizer.embedding.weight.detach()
    if l2_normalize:
        rows, codebook = unit(rows), unit(codebook)
    out = quantizer(latents)
    expected = naive_codes(rows, codebook).view(2, 3, 4)
    assert out.codes.dtype == torch.int64 and torch.equal(out.codes, expected)
    assert len(expected.unique()) > 3
    torch.testing.assert_close(as_rows(out.quantized.detach()), codebook[expected.flatten()])


@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("legacy, codebook_cost, commitment_cost", [(False, 1.0, 0.3), (True, 0.3, 1.0)])
def test_loss_and_its_gradients(l2_normalize, legacy, codebook_cost, commitment_cost):
    quantizer, latents = make(l2_normalize, legacy, beta=0.3)
    out = quantizer(latents)
    out.loss.backward()

    rows, weight = as_rows(latents.detach()), quantizer.embedding.weight.detach()
    z, codebook = (unit(rows), unit(weight)) if l2_normalize else (rows, weight)
    entries = codebook[out.codes.flatten()]
    torch.testing.assert_close(out.loss.detach(), 1.3 * ((z - entries) ** 2).mean())

    latent_gradient = commitment_cost * 2 * (z - entries) / z.numel()
    codebook_gradient = torch.zeros(K, D)
    for code, row, entry in zip(out.codes.flatten(), z, entries, strict=True):
        codebook_gradient[code] += codebook_cost * 2 * (entry - row) / z.numel()
    if l2_normalize:
        latent_gradient = through_unit(rows, latent_gradient)
        codebook_gradient = through_unit(weight, codebook_gradient)
    torch.testing.assert_close(as_rows(latents.grad), latent_gradient)
    torch.testing.assert_close(quantizer.embedding.weight.grad, codebook_gradient)


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_straight_through(l2_normalize):
    quantizer, latents = make(l2_normalize)
    gradient = torch.randn(2, D, 3, 4)
    quantizer(latents).quantized.backward(gradient)
    if l2_normalize:
        expected = through_unit(as_rows(latents.detach()), as_rows(gradient))
        torch.testing.assert_close(as_rows(latents.grad), expected)
    else:
        assert torch.equal(latents.grad, gradient)
    assert quantizer.embedding.weight.grad is None


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_lookup_is_what_quantizing_gives(l2_normalize):
    quantizer, latents = make(l2_normalize)
    out = quantizer(latents)
    looked_up = quantizer.lookup(out.codes)
    assert looked_up.shape == latents.shape and looked_up.dtype == torch.float32
    torch.testing.assert_close(looked_up, out.quantized)


def test_float32_under_autocast():
    quantizer, _ = make(codes=512)
    latents = 0.01 * torch.randn(4, D, 16, 16)
    plain = quantizer(latents)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mixed = quantizer(latents)
    assert mixed.quantized.dtype == mixed.loss.dtype == torch.float32
    assert torch.equal(mixed.codes, plain.codes) and torch.equal(mixed.loss, plain.loss)
    low = latents.bfloat16()
    assert torch.equal(quantizer(low).codes, quantizer(low.float()).codes)


def test_a_kind_that_lacks_a_method_cannot_be_built():
    class Incomplete(CodebookQuantizer):
        def quantize(self, z):
            return z, z, z

    with pytest.raises(TypeError, match=r"codebook.*entry_weights.*move_entries"):
        Incomplete(K, D, None)


@pytest.mark.parametrize("rows", [1, 4, 5, 10, 13])
def test_chunks_of_the_search_join_seamlessly(monkeypatch, rows):
    torch.manual_seed(1)
    latents, codebook = torch.randn(rows, D), torch.randn(K, D)
    for held in ("CPU_SCORES", "DEVICE_SCORES"):
        monkeypatch.setattr(quantizer_base, held, 5 * len(codebook))
    assert torch.equal(nearest_code(latents, codebook), naive_codes(latents, codebook))
