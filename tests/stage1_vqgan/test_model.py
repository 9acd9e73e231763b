"""The tokenizer: contracts, exact saving, fingerprint, initialisation, and the original's stored numbers."""

import copy
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from configs.checksums import verify_checksums, write_checksums
from stage1_vqgan import VQGANConfig, VQGANModel
from tests import golden_models
from tests.devices import cpu_only, on_device
from tests.fuzz.harness import planted_pickle
from tests.golden import GOLDEN
from tests.model_folders import change_config, change_weights, without

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
    assert model.config.downsampling_factor == 4 and model.config.grid == (4, 4)
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


@cpu_only
@torch.no_grad()
def test_the_memory_format_of_entries_does_not_change_the_image():
    """On a CPU, convolutions of channels-last maps round more."""
    model = make(base_channels=32, norm_num_groups=32)
    quantized = model.quantize.lookup(torch.arange(32).view(2, 4, 4))
    assert not quantized.is_contiguous()
    images = model.decode(quantized)
    assert torch.equal(images, model.decode(quantized.contiguous()))
    exact = copy.deepcopy(model).double().decode(quantized.double())
    assert (images - exact).abs().max() < 1e-5


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


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_fingerprint_of_other_weights_is_refused(tmp_path, dtype):
    """Whether the weights or the configuration were exchanged."""
    make().save_pretrained(tmp_path / "a")
    make(seed=1).save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        mixed = shutil.copytree(tmp_path / "a", tmp_path / f"with the other {name}")
        shutil.copy(tmp_path / "b" / name, mixed)
        with pytest.raises(
            ValueError, match=rf"{mixed}: fingerprint: config\.json has \w{{16}}, .*weights have \w{{16}}"
        ):
            VQGANModel.from_pretrained(mixed, dtype=dtype)
    change_config(tmp_path / "a", quantizer_options={"l2_normalize": True})
    with pytest.raises(ValueError, match="one of these files was changed"):
        VQGANModel.from_pretrained(tmp_path / "a", dtype=dtype)


def test_one_changed_bit_in_the_encoder_is_found(tmp_path):
    make().save_pretrained(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        value = file.get_tensor("encoder.conv_in.weight").numpy().tobytes()
    data[data.index(value)] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="fingerprint"):
        VQGANModel.from_pretrained(tmp_path)


def test_other_codes_have_no_fingerprint_until_they_are_saved(tmp_path):
    make().save_pretrained(tmp_path / "a")
    model = VQGANModel.from_pretrained(tmp_path / "a", quantizer_options={"l2_normalize": True})
    assert model.config.fingerprint is None
    model.save_pretrained(tmp_path / "b")
    assert VQGANModel.from_pretrained(tmp_path / "b").config.fingerprint == model.compute_fingerprint()
    kept = VQGANModel.from_pretrained(tmp_path / "a", dropout=0.1)
    assert kept.config.fingerprint == kept.compute_fingerprint()


def test_weights_of_another_quantizer_are_refused(tmp_path):
    """Those of some quantizers have the same names and shapes."""
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantizer: received 'ibq', but .* was trained with 'vq'"):
        VQGANModel.from_pretrained(tmp_path, quantizer="ibq")


@pytest.mark.parametrize("key", ["encoder.conv_in.weight", "decoder.conv_out.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, key, value):
    model = make()
    model.get_parameter(key).data.flatten()[-1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: model\.safetensors: .*1 not finite: {key}"):
        VQGANModel.from_pretrained(tmp_path)


def test_long_lists_of_weights_are_cut(tmp_path):
    make().save_pretrained(tmp_path)
    change_weights(tmp_path, without("encoder"))
    with pytest.raises(
        ValueError, match=r"\d\d missing: encoder\.\S+, encoder\.\S+, encoder\.\S+ and \d\d more;"
    ) as error:
        VQGANModel.from_pretrained(tmp_path)
    assert len(str(error.value)) < 400


def test_saving_removes_the_checksums_of_older_files(tmp_path):
    make().save_pretrained(tmp_path)
    write_checksums(tmp_path)
    verify_checksums(tmp_path)
    make(seed=1).save_pretrained(tmp_path)
    verify_checksums(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(planted_pickle(tmp_path / "canary"))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        VQGANModel.from_pretrained(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_a_saved_tokenizer_chooses_no_kernel(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    change_config(tmp_path, _attn_implementation="someone/kernel")
    kernels = "transformers.integrations.hub_kernels.load_and_register_attn_kernel"
    monkeypatch.setattr(kernels, lambda *a, **k: pytest.fail("asked for a kernel"))
    assert VQGANModel.from_pretrained(tmp_path).config._attn_implementation == "eager"


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
