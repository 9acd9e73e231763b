"""The memory format of training: channels-last, but not in bfloat16 on a CPU."""

import pytest
import torch

from stage1_vqgan.training.components import memory_format
from stage1_vqgan.training.run import train
from stage1_vqgan.training.step import VQGANTrainer
from tests.stage1_vqgan.training.test_resume import make_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "device, changes, wanted",
    [
        (CPU, {}, torch.channels_last),
        (CPU, {"bf16": True}, torch.contiguous_format),
        (CUDA, {"bf16": True}, torch.channels_last),
        (CUDA, {"bf16": True, "channels_last": False}, torch.contiguous_format),
    ],
)
def test_device_and_precision_decide(device, changes, wanted, tmp_path):
    assert memory_format(make_config(tmp_path, **changes), device) == wanted


@pytest.mark.parametrize("bf16", [False, True])
def test_gray_images_are_trained_in_the_format(bf16, tmp_path, monkeypatch):
    """The strides of gray images suit both formats; those of what the layers pass on show which one is used."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    seen, step = [], VQGANTrainer.step

    def watched(trainer, images, number):
        convolution = trainer.model.encoder.conv_in
        handle = convolution.register_forward_hook(lambda module, inputs, output: seen.append(output.stride()))
        scalars = step(trainer, images, number)
        handle.remove()
        return scalars

    monkeypatch.setattr(VQGANTrainer, "step", watched)
    train(make_config(tmp_path, bf16=bf16, max_steps=1, save_steps=1, gradient_accumulation_steps=1))
    assert seen == [(512, 64, 8, 1) if bf16 else (512, 1, 64, 8)]  # of (8, 8, 8, 8)
