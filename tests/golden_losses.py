"""Compares losses and discriminator with stored results of the original code.

Our results come from `VQGANTrainer.step`, whose generator is replaced by the stored features and the last layer.
"""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from configs import load_config
from stage1_vqgan import Stage1Config
from stage1_vqgan.quantizers import build_quantizer
from stage1_vqgan.training.discriminator import PatchDiscriminator
from stage1_vqgan.training.losses import GENERATOR_LOSSES
from stage1_vqgan.training.step import VQGANTrainer
from tests.devices import DEVICE
from tests.golden import GOLDEN, GRADIENTS, OUTPUTS, Found, elementwise, relative, state


class StoredGenerator(nn.Module):
    """A generator of stored features, with the stored last layer and the stored codebook loss as a parameter."""

    def __init__(self, golden: dict[str, Tensor]):
        super().__init__()
        self.config = SimpleNamespace(
            num_embeddings=2, in_channels=3, num_res_blocks=0, decoder_blocks=1, widths=[], resolutions=[]
        )
        self.features, self.is_gradient_checkpointing = golden["io.feat"], False
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.decoder.conv_out = nn.Conv2d(8, 3, 3, padding=1, bias=False)
        self.decoder.conv_out.weight.data = golden["io.last_layer"].clone()
        self.codebook_loss = nn.Parameter(golden["io.codebook_loss"].clone())
        self.quantize = build_quantizer("lfq", 2, 1, {})  # it has no weights

    def forward(self, images: Tensor) -> Any:
        return SimpleNamespace(
            reconstruction=self.decoder.conv_out(self.features),
            decoder_features=self.features,
            codebook_loss=self.codebook_loss * 1,
            codes=torch.zeros(1, 1, 1, dtype=torch.int64, device=self.features.device),
            latents=torch.zeros(1, 1, 1, 1, device=self.features.device),
        )


class StoredTrainer(VQGANTrainer):
    """A trainer of the stored generator. It stores the gradients of an update instead of applying them."""

    def __init__(self, golden: dict[str, Tensor], config: Stage1Config):
        self.gradients: dict[str, Tensor] = {}
        with patch("stage1_vqgan.training.step.build_tokenizer", lambda config: StoredGenerator(golden)):
            super().__init__(config, Accelerator())

    def _update(self, model: nn.Module, optimizer: Any, objective: Tensor, step: int) -> dict[str, Tensor]:
        objective.backward()
        self.gradients |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {}


def compare() -> Iterator[Found]:
    """Compares every stored quantity of the losses and the discriminator."""
    golden = load_file(GOLDEN / "losses.safetensors", device=str(DEVICE))
    stored = json.loads((GOLDEN / "losses.json").read_text())
    for name, case in stored["cases"].items():
        if name.startswith("eval_nograd"):
            discriminator = patch_discriminator(golden, "disc.", base_channels=32, num_layers=3)
            discriminator(golden["io.recon"])  # one training forward has updated the statistics
            g_loss = GENERATOR_LOSSES["hinge"](discriminator.eval()(golden["io.recon"]))
            yield Found("g_loss in eval mode", name, abs(g_loss.item() - case["g_loss"]), OUTPUTS)
        else:
            yield from compare_step(golden, name, case, stored["kwargs"])
    yield from compare_logits(golden)
    yield from compare_actnorm(golden)


def compare_step(
    golden: dict[str, Tensor], name: str, case: dict[str, float], kwargs: dict[str, float]
) -> Iterator[Found]:
    kind, step, perceptual_weight = name.split("_")
    number, weight = int(step.removeprefix("step")), int(perceptual_weight.removeprefix("pw"))
    trainer = StoredTrainer(golden, step_config(kind, kwargs))
    trainer.discriminator.load_state_dict(state(golden, "disc."))
    if weight:  # the original ran with a stand-in for LPIPS
        trainer.config.loss.perceptual_weight = weight
        trainer.generator_terms.losses["perceptual"] = lambda a, b: (a - b).square().mean()
    metrics = {key: value.item() for key, value in trainer.step(golden["io.input"], number).items()}
    playing = number >= kwargs["disc_start"]
    assert playing == ("loss/adversarial" in metrics) == ("loss/discriminator" in metrics)

    rate = metrics.get("adversarial/adaptive_weight", 0.0) * kwargs["disc_weight"]
    nll = metrics["loss/l1"] + weight * metrics.get("loss/perceptual", 0.0)
    found = {
        "rec_loss": nll,  # in the original it includes the perceptual term
        "p_loss": metrics.get("loss/perceptual", 0.0),
        "nll_loss": nll,
        "quant_loss": metrics["loss/codebook"],
        "total_loss": nll + metrics["loss/codebook"] + rate * metrics.get("loss/adversarial", 0.0),
        "disc_loss": metrics.get("loss/discriminator", 0.0),
    }
    if playing:  # before that, the original multiplies them by 0
        found |= {"d_weight": rate, "g_loss": metrics["loss/adversarial"]}
        found |= {f"logits_{side}": metrics[f"logits/{side}"] for side in ("real", "fake")}
    for quantity, value in found.items():
        yield Found(quantity, name, abs(value - case[quantity]), OUTPUTS)

    gradient = trainer.gradients["decoder.conv_out.weight"]
    norm = case["grad_last_layer_norm"]
    yield Found("norm of the last layer's gradient", name, abs(gradient.norm().item() - norm) / norm, GRADIENTS)
    to_codebook = trainer.gradients["codebook_loss"].item()
    yield Found("grad_codebook_loss", name, abs(to_codebook - case["grad_codebook_loss"]), GRADIENTS)
    if f"grad.last_layer.{name}" in golden:
        error = relative(gradient, golden[f"grad.last_layer.{name}"])
        yield Found("the last layer's gradient", name, error, GRADIENTS)
        error = relative(trainer.gradients["main.0.weight"], golden["grad.disc.main.0.weight"])
        yield Found("the discriminator's first gradient", name, error, GRADIENTS)
        after = trainer.discriminator.state_dict()
        for key, value in state(golden, "after_gd.").items():
            yield Found("BatchNorm's statistics", key, elementwise(after[key], value), OUTPUTS)


def compare_logits(golden: dict[str, Tensor]) -> Iterator[Found]:
    for mode in ("eval", "train"):
        discriminator = patch_discriminator(golden, "disc.", base_channels=32, num_layers=3).train(mode == "train")
        for side, images in (("real", "io.input"), ("fake", "io.recon")):
            error = elementwise(discriminator(golden[images]), golden[f"disc_{mode}.{side}"])
            yield Found(f"PatchGAN logits in {mode} mode", side, error, OUTPUTS)


def compare_actnorm(golden: dict[str, Tensor]) -> Iterator[Found]:
    discriminator = patch_discriminator(
        golden, "actnorm_init.", base_channels=32, num_layers=2, norm_type="actnorm"
    ).train()
    for call, images in (("first", "io.input"), ("second", "io.recon")):
        error = elementwise(discriminator(golden[images]), golden[f"actnorm.out_{call}_train"])
        yield Found("ActNorm logits", call, error, OUTPUTS)
    after = discriminator.state_dict()
    for key, value in state(golden, "actnorm_after.").items():
        assert after[key].dtype == value.dtype
        yield Found("ActNorm parameters after", key, elementwise(after[key], value), OUTPUTS)


def step_config(kind: str, kwargs: dict[str, float]) -> Stage1Config:
    start = int(kwargs["disc_start"])
    values = {
        "output_dir": "unused",
        "max_steps": 200,
        "data.dataset": "digits",
        "model.image_size": 64,
        "model.channel_multiplier": [1, 1],
        "model.attn_resolutions": [],
        "loss.l1_weight": kwargs["pixelloss_weight"],
        "loss.perceptual_weight": 0,
        "loss.codebook_weight": kwargs["codebook_weight"],
        "loss.adversarial_weight": kwargs["disc_weight"],
        "loss.adversarial_type": kind,
        "loss.discriminator_start_step": start,
        "loss.adversarial_start_step": start,
        "discriminator.base_channels": kwargs["disc_ndf"],
        "discriminator.num_layers": kwargs["disc_num_layers"],
        "codebook.restart_interval": 0,
    }
    return load_config(Stage1Config, None, values)


def patch_discriminator(golden: dict[str, Tensor], prefix: str, **settings: Any) -> PatchDiscriminator:
    discriminator = PatchDiscriminator(3, **settings).to(DEVICE)
    discriminator.load_state_dict(state(golden, prefix))
    return discriminator
