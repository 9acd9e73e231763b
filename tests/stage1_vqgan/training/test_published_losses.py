"""The losses of published tokenizers, written out from their sources, compared with a training step.

One graph, `total.backward()`; nothing of the package but the models themselves.
"""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torchvision import models

from configs import load_config
from configs.yaml_files import parse_yaml
from stage1_vqgan import Stage1Config
from tests.stage1_vqgan.training import test_step
from tests.stage1_vqgan.training.test_step import Recorder, assert_gradients_close, make_config, make_images

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
STEP = 10
# The classifier of a source's perceptual term, and the smaller one of the test; 224 pixels in the sources.
CLASSIFIERS = {
    "MaskBit": ("torchvision/resnet50", "torchvision/resnet18"),
    "TiTok": ("torchvision/convnext_small", "torchvision/convnext_tiny"),
}
CLASSIFIER_SIZE = 40
ROOT = Path(__file__).resolve().parents[3]


def taming(x, y, perceptual, logits, codebook, last_layer):
    """CompVis/taming-transformers, vqperceptual.py, with imagenet_vqgan.yaml; `logits` are D(x̂)."""
    nll = (x - y).abs().mean() + perceptual
    g_loss = -logits.mean()
    of_nll, of_g = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll, g_loss))
    d_weight = (of_nll.norm() / (of_g.norm() + 1e-4)).clamp(0, 1e4).detach() * 0.8
    return nll + d_weight * g_loss + codebook


def llamagen(x, y, perceptual, logits, codebook, last_layer):
    """FoundationVision/LlamaGen, vq_loss.py, with the defaults of vq_train.py."""
    return ((x - y) ** 2).mean() + perceptual - 0.5 * logits.mean() + codebook


def maskbit(x, y, perceptual, logits, codebook, last_layer):
    """markweberdev/maskbit, losses.py, with maskbit_tokenizer_14bit.yaml; its pixels are in [0, 1]."""
    return 4.0 * ((x / 2 - y / 2) ** 2).mean() + 0.1 * perceptual - 0.02 * logits.mean() + codebook


def titok(x, y, perceptual, logits, codebook, last_layer):
    """bytedance/1d-tokenizer, losses.py, with stage2/titok_b64.yaml but a codebook loss; pixels in [0, 1]."""
    return ((x / 2 - y / 2) ** 2).mean() + 0.1 * perceptual - 0.01 * logits.mean() + codebook


def ibq(x, y, perceptual, logits, codebook, last_layer):
    """TencentARC/SEED-Voken, vqperceptual.py, with imagenet_ibqgan_16384.yaml.

    The source averages the logits of an image before its cross-entropy; here each patch has one.
    """
    adversarial = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    return (x - y).abs().mean() + perceptual + 0.1 * adversarial + codebook


def llamagen_non_saturating(x, y, perceptual, logits, codebook, last_layer):
    """Its option `--gen-loss non-saturating`, as cross-entropy with the label 1 (its code swaps label and logit)."""
    adversarial = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    return ((x - y) ** 2).mean() + perceptual + 0.5 * adversarial + codebook


def hinge(real, fake, anchors):
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()


def hinge_with_lecam(real, fake, anchors, weight=0.001):
    """LeCam of google/lecam-gan, losses.py; MaskBit and TiTok take the mean of the logits before the ReLU."""
    lecam = F.relu(real - anchors[1]).pow(2).mean() + F.relu(anchors[0] - fake).pow(2).mean()
    return hinge(real, fake, anchors) + weight * lecam


def logit_distance(x, y, classifier):
    """PerceptualLoss of MaskBit and TiTok, perceptual_loss.py, with the logits of a classifier; pixels in [0, 1]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = [
        (F.interpolate(images / 2 + 0.5, size=CLASSIFIER_SIZE, mode="bilinear", antialias=True) - mean.view(1, 3, 1, 1))
        / std.view(1, 3, 1, 1)
        for images in (x, y)
    ]
    return F.mse_loss(*map(classifier, normalised))


def perceptual_distance(losses, x, y):
    """The perceptual term of a source, with the weights of the trainer's network."""
    if "perceptual" in losses:
        return losses["perceptual"].lpips(y, x).mean()
    network = losses["logits"].network
    classifier = models.get_model(network.name.removeprefix("torchvision/").partition("@")[0]).eval()
    classifier.load_state_dict(network.module.network.state_dict())
    return logit_distance(x, y, classifier)


def in_a_test(name):
    """The loss of a recipe, without steps and downloads."""
    loss = recipes()[name]["loss"]
    changes = {f"loss.{key}": value for key, value in loss.items() if not key.endswith("_step")}
    if name in CLASSIFIERS:
        network, smaller = CLASSIFIERS[name]
        assert loss["logits_network"] == network
        changes |= {"loss.logits_network": f"{smaller}@{CLASSIFIER_SIZE}", "loss.logits_network_weights": "random"}
    return changes


LOSSES = {
    "VQGAN": (taming, hinge),
    "LlamaGen": (llamagen, hinge),
    "IBQ": (ibq, partial(hinge_with_lecam, weight=0.05)),
    "MaskBit": (maskbit, hinge_with_lecam),
    "TiTok": (titok, hinge_with_lecam),
}


def recipes():
    """The settings in the README, by the name of the recipe."""
    text = (ROOT / "stage1_vqgan" / "README.md").read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
    found = re.findall(r"\n### (\w+)\n.*?```yaml\n(.*?)```", text, re.DOTALL)
    return {name: parse_yaml(block)[0] for name, block in found}


def test_the_readme_has_the_recipes():
    assert recipes().keys() == LOSSES.keys()
    for settings in recipes().values():
        alone = {key: value for key, value in settings.items() if key != "trainable"}
        load_config(Stage1Config, "imagenet256/stage1", alone)


@pytest.mark.parametrize(("name", "preset"), [("VQGAN", "original"), ("LlamaGen", "llamagen_f16"), ("IBQ", "ibq_16k")])
def test_the_presets_have_the_recipes(name, preset):
    config = load_config(Stage1Config, f"imagenet256/{preset}")
    of_sections = {key: value for key, value in recipes()[name].items() if isinstance(value, dict)}
    changes = {f"{key}.{inner}": value for key, values in of_sections.items() for inner, value in values.items()}
    changes |= {key: value for key, value in recipes()[name].items() if key not in of_sections}
    assert load_config(Stage1Config, f"imagenet256/{preset}", changes) == config
    assert config.model["image_size"] == 256 and config.vqgan_config().grid == (16, 16)


@pytest.mark.parametrize(
    ("name", "generator_type"),
    [
        *(pytest.param(name, None, marks=[pytest.mark.slow] if name == "TiTok" else []) for name in LOSSES),
        ("LlamaGen", "non_saturating"),
    ],
)
def test_a_step_is_that_of_the_source(name, generator_type):
    of_generator, of_discriminator = LOSSES[name]
    if generator_type is not None:
        of_generator = llamagen_non_saturating
    changes = in_a_test(name)
    changes |= {"loss.l1_weight": changes.get("loss.l1_weight", 1), "loss.l2_weight": changes.get("loss.l2_weight", 0)}
    changes |= {"loss.codebook_weight": 1, "loss.perceptual_weight": changes.get("loss.perceptual_weight", 1)}
    changes |= {"model.image_size": 32} | ({"loss.generator_type": generator_type} if generator_type else {})
    trainer = Recorder(make_config(**changes), Accelerator())
    weights = trainer.config.loss.terms()
    images = make_images(1, batch=3, size=32)
    test_step.spread_codebook(trainer, images)
    with torch.no_grad():
        trainer.discriminator.main[-1].weight.mul_(30)  # makes the logits large
        trainer.discriminator_terms.anchors.means.copy_(torch.tensor([0.4, -0.2]))

    model, discriminator = copy.deepcopy(trainer.model), copy.deepcopy(trainer.discriminator)
    out = model(images)
    fake = out.reconstruction
    perceptual = perceptual_distance(trainer.generator_terms.losses, images, fake)
    logits = copy.deepcopy(discriminator)(fake)
    total = of_generator(images, fake, perceptual, logits, out.codebook_loss, model.decoder.conv_out.weight)
    total.backward()
    real_logits, fake_logits = discriminator(images), discriminator(fake.detach())
    loss = of_discriminator(real_logits, fake_logits, (0.4, -0.2))
    loss.backward()

    metrics = trainer.step(images, STEP)
    assert ("adversarial/adaptive_weight" in metrics) == (name == "VQGAN")
    assert_gradients_close(trainer.gradients["generator"], gradients(model))
    assert_gradients_close(trainer.gradients["discriminator"], gradients(discriminator))
    if name != "VQGAN":
        terms = [term for term in weights if weights[term] and term != "lecam"]
        found = sum(weights[term] * metrics[f"loss/{term}"].item() for term in terms)
        assert found == pytest.approx(total.item(), rel=1e-5)
    lecam = weights["lecam"] * metrics.get("loss/lecam", torch.zeros(())).item()
    assert metrics["loss/discriminator"].item() + lecam == pytest.approx(loss.item(), rel=1e-5)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}
