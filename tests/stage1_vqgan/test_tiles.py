"""Encoding and decoding in tiles equals that of the whole image."""

import itertools

import pytest
import torch

from stage1_vqgan import VQGANConfig, VQGANModel, decode_tiled, encode_tiled, tiled
from tests.devices import on_device
from tests.slow import few

pytestmark = [on_device, pytest.mark.usefixtures("no_gradients")]

SEAM = 1 / 255  # pixels are in [-1, 1]; the bound for images in [0, 1] is twice as wide


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def images():
    """Two images whose halves differ in brightness and contrast, so that statistics of a tile are not those of all."""
    images = torch.rand(2, 3, 56, 40) * 2 - 1
    images[..., :20] = images[..., :20] * 0.1 + 0.8
    return images


def model(attn_levels, dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multiplier": [1, 1, 2], "num_res_blocks": 2, "norm_num_groups": 4}
    codes = {"latent_channels": 8, "embed_dim": 4, "num_embeddings": 64}
    vqgan = (
        VQGANModel(VQGANConfig(image_size=32, attn_levels=attn_levels, **sizes, **codes, **options)).eval().to(dtype)
    )
    for parameter in vqgan.parameters():  # biases and scales of all layers matter
        parameter += 0.1 * torch.randn_like(parameter)
    return vqgan


@pytest.mark.parametrize(
    ("tile", "attn_levels"),
    few(itertools.product([16, 36], [[], [2], [1]]), (16, [1]), (36, []), (36, [2])),
)
def test_tiles_are_the_whole(attn_levels, tile, images):
    vqgan, images = model(attn_levels), images.double()
    whole, parts = vqgan.encode(images), encode_tiled(vqgan, images, tile)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=1e-10)
    assert torch.equal(parts.codes, whole.codes) and len(whole.codes.unique()) > 10
    decoded = vqgan.decode_codes(whole.codes)
    torch.testing.assert_close(decode_tiled(vqgan, whole.codes, tile), decoded, rtol=0, atol=1e-10)
    assert decoded.std() > 0.1


def test_a_trained_tokenizer_shows_no_seam(tiny_pipeline):
    vqgan = tiny_pipeline.vqgan
    images = torch.nn.functional.interpolate(torch.rand(1, 1, 20, 12), scale_factor=4, mode="bicubic") * 2 - 1
    whole, parts = vqgan.encode(images), encode_tiled(vqgan, images, 16)
    assert (parts.codes == whole.codes).float().mean() > 0.99
    seams = decode_tiled(vqgan, whole.codes, 16) - vqgan.decode_codes(whole.codes)
    assert seams.abs().max() < SEAM / 10


def test_tiles_that_know_nothing_of_each_other_would_show_seams(images):
    """What this test image shows: decoded apart, its halves differ from the whole."""
    vqgan, images = model([2]), images.double()
    codes = vqgan.encode(images).codes
    apart = torch.cat([vqgan.decode_codes(half) for half in codes.tensor_split(2, dim=2)], dim=3)
    assert (apart - vqgan.decode_codes(codes)).abs().max() > 10 * SEAM


def test_half_precision_keeps_its_dtype(images):
    vqgan = model([2], torch.bfloat16)
    codes = encode_tiled(vqgan, images.bfloat16(), 16).codes
    assert decode_tiled(vqgan, codes, 16).dtype == torch.bfloat16


def test_only_the_maps_between_stages_are_whole(images, monkeypatch):
    """No layer of the highest resolution gets more than a tile and its overlap."""
    vqgan = model([2])
    widest = {}
    for name, layer in vqgan.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, args, out, name=name: widest.update({name: max(widest.get(name, 0), *out.shape[2:])})
            )
    decode_tiled(vqgan, encode_tiled(vqgan, images.double(), 16).codes, 16)
    whole = max(images.shape[2:])
    tops = [name for name in widest if ".down.0.block" in name or ".up.0." in name or name == "encoder.conv_in"]
    assert len(tops) > 10 and all(widest[name] <= 16 + 2 * 12 < whole for name in tops), widest


def test_the_model_stays_as_it_was():
    vqgan = model([2])
    view = tiled(vqgan)
    assert type(view.encoder) is not type(vqgan.encoder) and view.quantize is vqgan.quantize
    assert view.quant_conv.weight is vqgan.quant_conv.weight


@pytest.mark.parametrize("tile", [0, 18, 512.0, -4, "512"])
def test_tiles_of_other_sizes_are_refused(tile):
    with pytest.raises(ValueError, match=f"tile: received {tile!r}; allowed are multiples of 4 from 16 up"):
        tiled(model([2]), tile)


def test_codes_of_several_grids_need_their_grid():
    vqgan = model([2], quantizer="pyramid", quantizer_options={"hidden_channels": 8})
    codes = encode_tiled(vqgan, torch.zeros(1, 3, 48, 80, dtype=torch.float64), 16).codes
    assert decode_tiled(vqgan, codes, 16, (12, 20)).shape == (1, 3, 48, 80)
