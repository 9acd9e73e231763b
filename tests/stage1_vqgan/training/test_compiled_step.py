"""A compiled training step equals the eager one, and no step waits for the device."""

import functools
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from stage1_vqgan.training.components import memory_format
from stage1_vqgan.training.run import train
from stage1_vqgan.training.step import VQGANTrainer
from tests.stage1_vqgan.training import test_resume
from tests.stage1_vqgan.training.test_step import (
    Recorder,
    assert_gradients_close,
    make_config,
    make_images,
    spread_codebook,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

# Operations that copy a number or a shape to the host. (A copy between devices cannot be seen on a CPU.)
WAITING = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2"}


@pytest.fixture
def compiler():
    """torch.compile; its state is reset after the test."""
    yield torch.compile
    torch.compiler.reset()


@pytest.fixture
def without_code(compiler, monkeypatch):
    """torch.compile traces and differentiates, but generates no code, which would take minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend="aot_eager"))


def small_config(**changes):
    values = {
        "model.image_size": 8,
        "model.channel_multiplier": [1],
        "model.attn_resolutions": [],
        "model.num_embeddings": 8,
        "loss.discriminator_start_step": 0,
    }
    return make_config(**values | changes)


def one_step(config, images, compiled):
    AcceleratorState._reset_state(True)
    config.torch_compile = compiled
    images = images.contiguous(memory_format=memory_format(config, torch.device("cpu")))
    trainer = Recorder(config, Accelerator(mixed_precision=config.mixed_precision))
    metrics = trainer.step(images, 0)
    return trainer, {name: value.item() for name, value in metrics.items()}


def assert_compiled_is_eager(config, images, rel=1e-5, rtol=1e-4, of_whole=1e-6):
    torch._dynamo.utils.counters.clear()
    eager, expected = one_step(config, images, False)
    assert not torch._dynamo.utils.counters["stats"]
    trainer, found = one_step(config, images, True)
    parts = ["encoder", "decoder"]
    parts += ["discriminator, frozen", "discriminator"] if config.compiles_discriminator else []
    parts += ["LPIPS"] if config.loss.perceptual_weight else []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(parts)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert found == pytest.approx(expected, rel=rel)
    assert trainer.gradients.keys() == eager.gradients.keys()
    for name, gradients in eager.gradients.items():
        assert_gradients_close(trainer.gradients[name], gradients, rtol, of_whole)
    assert trainer.model.state_dict().keys() == eager.model.state_dict().keys()
    assert trainer.discriminator.state_dict().keys() == eager.discriminator.state_dict().keys()
    return trainer


@pytest.mark.slow
def test_the_compiled_step_is_the_eager_one_and_is_made_once(without_code):
    trainer = assert_compiled_is_eager(small_config(), make_images(0, size=8))
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        trainer.average(make_images(1, batch=3, size=8))  # evaluation, and k-means, with batches of other sizes
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (1, 2):
            trainer.set_learning_rate(number)
            images = make_images(number, size=8).contiguous(memory_format=torch.channels_last)
            trainer.step(images, number)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"loss.gradient_penalty_weight": 1.0, "loss.r1_weight": 1.0, "discriminator.norm_type": "group"},
        {"loss.lecam_weight": 1.0, "discriminator.norm_type": "actnorm", "loss.adversarial_type": "non_saturating"},
        {"model.quantizer": "ema", "model.dropout": 0.0},
        {"model.quantizer": "gumbel"},
        {"model.image_size": 32, "loss.perceptual_weight": 1.0, "bf16": True, "model.mid_attention": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_game_is_compiled_as_it_is(without_code, changes):
    config = small_config(**changes)
    assert_compiled_is_eager(config, make_images(0, size=config.model["image_size"]))


@pytest.mark.slow
def test_compiled_attention_in_bfloat16_differs_by_its_rounding(without_code):
    """bfloat16 rounds by up to 2^-9 of a value, in attention in other places when compiled. Measured: 4e-3 in all."""
    config = small_config(**{"model.image_size": 32, "loss.perceptual_weight": 1.0, "bf16": True})
    assert_compiled_is_eager(config, make_images(0, size=32), of_whole=10 * 2**-9)


@pytest.mark.slow
def test_the_code_of_the_compiler_is_the_eager_step(compiler):
    changes = {"model.image_size": 32, "loss.perceptual_weight": 1.0}
    assert_compiled_is_eager(small_config(**changes), make_images(0, size=32))


def test_what_is_differentiated_twice_stays_eager():
    compiles = {
        (norm, penalty): make_config(
            torch_compile=True, **{"discriminator.norm_type": norm, f"loss.{penalty}_weight": 1.0}
        ).compiles_discriminator
        for norm in ("group", "actnorm")
        for penalty in ("lecam", "r1", "gradient_penalty")
    }
    assert [case for case, compiled in compiles.items() if compiled] == [("group", "lecam")]
    assert not make_config().compiles_discriminator


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(without_code, tmp_path):
    changes = {"torch_compile": True, "discriminator.norm_type": "group", "loss.gradient_penalty_weight": 0}
    straight, again = tmp_path / "straight", tmp_path / "again"
    train(test_resume.make_config(straight, **changes))
    shutil.copytree(straight, again)
    test_resume.interrupt(again, after=3)
    train(test_resume.make_config(again, **changes))
    expected, found = test_resume.contents(straight), test_resume.contents(again)
    assert [path for path in expected if not torch.equal(expected[path], found[path])] == []


class Operations(TorchDispatchMode):
    """Names of all operations; of copies of whole batches `(B, …)` of features, those that change their layout."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.names, self.rearranged = batch, set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in {"clone", "copy_", "_to_copy"} and out.ndim == 4 and len(out) == self.batch:
            source = args[1] if name == "copy_" else args[0]
            if source.shape == out.shape and source.stride() != out.stride():
                self.rearranged.append((name, tuple(out.shape)))
        return out


@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_in_a_step_waits_for_the_device_or_changes_the_layout(bf16):
    changes = {"loss.lecam_weight": 0.1, "loss.perceptual_weight": 1.0, "model.image_size": 32, "bf16": bf16}
    config = make_config(max_grad_norm=1.0, **changes)
    trainer = VQGANTrainer(config, Accelerator(mixed_precision=config.mixed_precision))
    layout = memory_format(config, trainer.accelerator.device)
    images = make_images(0, batch=5, size=32).to(memory_format=layout)
    spread_codebook(trainer, images)
    trainer.set_learning_rate(0)
    trainer.step(images, 0)
    with Operations(batch=5) as operations:
        trainer.step(images, 1)
    assert "_fused_adamw_" in operations.names and not operations.names & WAITING
    # The quantizer reads the latents as rows: a copy of these few numbers, unless they lie channels-last.
    rows = {(5, 16, 16, 4), (5, 4, 16, 16)} if layout == torch.contiguous_format else set()
    assert {shape for _, shape in operations.rearranged} == rows
    with trainer.accelerator.autocast():  # the largest feature map is not converted to float32
        assert trainer.generator(images).decoder_features.dtype == (torch.bfloat16 if bf16 else torch.float32)
