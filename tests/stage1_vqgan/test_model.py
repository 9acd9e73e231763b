"""The tokenizer: contracts, exact saving, fingerprint, initialisation, and the original's stored numbers."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stage1_vqgan import VQGANConfig, VQGANModel
from tests import golden_models
from tests.devices import on_device
from tests.golden import GOLDEN

pytestmark = on_device


def make(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "image_size": 16,
        "base_channels": 8,
        "channel_multiplier": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "norm_num_groups": 4,
        "latent_channels": 8,
        "embed_dim": 4,
        "num_embeddings": 32,
    }
    return VQGANModel(VQGANConfig(**settings | changes)).eval()


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def spread_codebook(model):
    """Moves the entries onto latents, so that images use many codes."""
    latents = model.encode(images(8, model.config.in_channels, 16, 16)).latents
    model.quantize.embedding.weight.copy_(latents.permute(0, 2, 3, 1).flatten(0, 2)[::4])
    return model


@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("channels, height, width", [(3, 16, 16), (1, 16, 16), (3, 12, 28)])
def test_shapes_and_types(channels, height, width, l2_normalize):
    model = spread_codebook(make(in_channels=channels, quantizer_options={"l2_normalize": l2_normalize}))
    assert model.config.downsampling_factor == 4 and model.config.grid_size == 4
    pixels, (h, w) = images(2, channels, height, width), (height // 4, width // 4)
    encoded, out = model.encode(pixels), model(pixels)
    assert encoded.codes.shape == (2, h, w) and encoded.codes.dtype == torch.int64
    assert encoded.latents.shape == encoded.quantized.shape == (2, 4, h, w)
    assert encoded.codebook_loss.shape == () and encoded.codebook_loss > 0
    assert out.reconstruction.shape == pixels.shape and out.reconstruction.dtype == torch.float32
    for name in ("codes", "latents", "quantized", "codebook_loss"):
        assert torch.equal(out[name], encoded[name])
    assert len(out.codes.unique()) > 3
    # the reconstruction decodes z + (e - z): 25 layers, each wrong by 2^-22 (tests/golden.py), three times as a margin
    torch.testing.assert_close(model.decode_codes(out.codes), out.reconstruction, atol=2e-5, rtol=0)
    torch.testing.assert_close(model.decoder.conv_out(out.decoder_features), out.reconstruction)


def test_images_of_a_batch_do_not_mix():
    model, pixels = spread_codebook(make()), images(3, 3, 16, 16)
    whole, single = model(pixels), model(pixels[1:2])
    assert torch.equal(whole.codes[1:2], single.codes)
    torch.testing.assert_close(whole.reconstruction[1:2], single.reconstruction, atol=2e-5, rtol=0)  # as above


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 18, 16), (2, 3, 16, 15)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"pixel_values.*divisible by 4"):
        make().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "codes, words",
    [
        (torch.zeros(2, 4, 4), "float32"),
        (torch.zeros(2, 4, 4, dtype=torch.int32), "int32"),
        (torch.zeros(4, 4, dtype=torch.int64), r"\(4, 4\)"),
        (torch.full((1, 2, 2), 32), "0 to 31"),
        (torch.full((1, 2, 2), -1), "from -1"),
    ],
)
def test_codes_that_do_not_fit(codes, words):
    with pytest.raises(ValueError, match=words):
        make().decode_codes(codes)


def test_saving_is_exact(tmp_path):
    model, pixels = spread_codebook(make(dropout=0.1, quantizer_options={"l2_normalize": True})), images(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = VQGANModel.from_pretrained(tmp_path)
    assert not loaded.training
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)
    assert model.config.to_diff_dict() == loaded.config.to_diff_dict() | {"dtype": model.config.dtype}
    assert torch.equal(model(pixels).reconstruction, loaded(pixels).reconstruction)
    assert loaded.config.fingerprint == model.config.fingerprint == model.compute_fingerprint()


def test_fingerprint_survives_a_cast(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "a")
    fingerprint = model.config.fingerprint
    half = VQGANModel.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "b")
    assert VQGANModel.from_pretrained(tmp_path / "b").config.fingerprint == fingerprint
    assert half(images(1, 3, 16, 16).bfloat16()).reconstruction.dtype == torch.bfloat16


def test_fingerprint_is_of_what_decides_the_codes():
    reference = make().compute_fingerprint()
    assert reference == make().compute_fingerprint() != make(seed=1).compute_fingerprint()
    for part, counts in {
        "encoder.conv_in.bias": True,
        "encoder.mid.attn_1.q.weight": True,
        "quant_conv.weight": True,
        "quantize.embedding.weight": True,
        "post_quant_conv.weight": False,
        "decoder.conv_out.weight": False,
    }.items():
        model = make()
        model.get_parameter(part).data.flatten()[0] += 0.5
        assert (model.compute_fingerprint() != reference) == counts, part
    assert make(quantizer_options={"l2_normalize": True}).compute_fingerprint() != reference
    assert make(dropout=0.3, quantizer_options={"commitment_cost": 0.5}).compute_fingerprint() == reference


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit(tmp_path, damage):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights, key = load_file(path), "encoder.conv_out.bias"
    if damage == "missing":
        del weights[key]
    elif damage == "unexpected":
        key = "encoder.conv_extra.bias"
        weights[key] = torch.zeros(3)
    else:
        weights[key] = torch.zeros(3)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=key):
        VQGANModel.from_pretrained(tmp_path)


def test_fresh_weights():
    model = make(base_channels=64, norm_num_groups=32, latent_channels=64, embed_dim=32, num_embeddings=512)
    codebook = model.quantize.embedding.weight.detach() * 512
    assert codebook.abs().max() <= 1 and codebook.std().item() == pytest.approx(3**-0.5, rel=0.02)
    assert codebook.mean().abs() < 0.02
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) > 20
    for module in convolutions:
        # PyTorch's default: both uniform within 1/√fan_in
        bound = 1 / math.sqrt(module.in_channels * math.prod(module.kernel_size))
        assert module.weight.abs().max() <= bound and module.bias.abs().max() <= bound
        if module.weight.numel() > 2000:
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.06)
            default = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size)
            assert module.weight.std().item() == pytest.approx(default.weight.std().item(), rel=0.08)
    first = model.encoder.mid.block_1.conv1.weight
    assert not torch.equal(first, model.encoder.mid.block_2.conv1.weight)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == 1e-6 and module.weight.eq(1).all() and module.bias.eq(0).all()


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is not there")
def test_the_originals_numbers():
    """`python -m tests.golden` prints them as a table."""
    found = list(golden_models.compare())
    assert {row.case.partition(",")[0] for row in found} == set(golden_models.ORIGINALS) and len(found) >= 40
    assert [row for row in found if not row.error <= row.bound] == []
