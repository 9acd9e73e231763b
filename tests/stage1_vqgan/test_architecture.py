"""Switches of the architecture, compared with layers that add nothing; and gradient checkpointing."""

import copy

import pytest
import torch

from configs import ConfigError
from stage1_vqgan import VQGANConfig, VQGANModel
from stage1_vqgan.convert import diffusers, janus
from stage1_vqgan.training.components import checkpoint_gradients
from tests.devices import DEVICE, on_device

pytestmark = on_device


def make(**changes):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "base_channels": 8, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1}
    codes = {"norm_num_groups": 4, "latent_channels": 8, "embed_dim": 4, "num_embeddings": 32}
    return VQGANModel(VQGANConfig(**sizes | codes | {"attn_levels": [1]} | changes)).eval().to(DEVICE)


def pixels(*shape):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(DEVICE)


def assert_equal_outputs(one, other):
    found, expected = one(pixels(2, 3, 16, 24)), other(pixels(2, 3, 16, 24))
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.reconstruction, expected.reconstruction)


def test_without_attention_in_the_middle(tmp_path):
    """It is as if the attention there added 0. The setting is saved."""
    whole = make()
    with torch.no_grad():
        for part in (whole.encoder.mid, whole.decoder.mid):
            part.attn_1.proj_out.weight.zero_(), part.attn_1.proj_out.bias.zero_()
    model = make(mid_attention=False)
    names = model.state_dict().keys()
    assert {name for name in whole.state_dict() if name not in names} == {
        name for name in whole.state_dict() if ".mid.attn_1." in name
    }
    model.load_state_dict({name: value for name, value in whole.state_dict().items() if name in names})
    assert_equal_outputs(model, whole)
    assert model.compute_fingerprint() != whole.compute_fingerprint()
    model.save_pretrained(tmp_path)
    assert_equal_outputs(VQGANModel.from_pretrained(tmp_path).to(DEVICE), whole)


def test_a_decoder_of_another_depth(tmp_path):
    """A third residual block that adds 0 changes nothing. The fingerprint, that of the codes, stays as it was."""
    usual, deep = make(), make(decoder_num_res_blocks=3, attn_levels=[1])
    assert make(decoder_num_res_blocks=2).state_dict().keys() == usual.state_dict().keys()
    assert all(len(level.block) == 3 for level in deep.decoder.up)
    assert all(len(level.block) == 1 for level in deep.encoder.down)
    deep.load_state_dict(usual.state_dict(), strict=False)
    with torch.no_grad():
        for level in deep.decoder.up:
            level.block[2].conv2.weight.zero_(), level.block[2].conv2.bias.zero_()
            for attention in level.attn[2:]:
                attention.proj_out.weight.zero_(), attention.proj_out.bias.zero_()
    assert_equal_outputs(deep, usual)
    assert deep.compute_fingerprint() == usual.compute_fingerprint()
    deep.save_pretrained(tmp_path)
    assert_equal_outputs(VQGANModel.from_pretrained(tmp_path).to(DEVICE), usual)
    with pytest.raises(Exception, match="decoder_num_res_blocks: received 0; must be at least 1"):
        make(decoder_num_res_blocks=0)


@pytest.mark.parametrize(
    ("target", "change"),
    [
        (diffusers, {"decoder_num_res_blocks": 5}),
        (janus, {"decoder_num_res_blocks": 5}),
        (janus, {"mid_attention": False}),
    ],
    ids=["diffusers-depth", "janus-depth", "janus-middle"],
)
def test_other_code_bases_do_not_have_these_switches(tmp_path, target, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        target.write(make(norm_num_groups=4, **change), tmp_path)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_number(autocast):
    """Values and gradients are equal, with dropout too; far less is kept for the backward."""
    plain = make(dropout=0.1).train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_gradients(checkpointed)
    assert checkpointed.is_gradient_checkpointing and not plain.is_gradient_checkpointing
    kept, found = {}, {}
    for name, model in {"plain": plain, "checkpointed": checkpointed}.items():
        kept[name] = 0

        def keep(tensor, name=name):
            kept[name] += tensor.nbytes * (not isinstance(tensor, torch.nn.Parameter))
            return tensor

        torch.manual_seed(2)
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with saving, torch.autocast(DEVICE.type, torch.bfloat16, autocast):
            out = model(pixels(2, 3, 16, 16))
            loss = (out.reconstruction.float() - pixels(2, 3, 16, 16)).abs().mean() + out.codebook_loss
        loss.backward()
        found[name] = [loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)]
    assert len(found["plain"]) > 100 and kept["checkpointed"] < 0.5 * kept["plain"]
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
