"""Sizes that no memory holds are refused before the work begins; those that fit are not."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs import ConfigError, load_config, memory
from pipelines import VQGANPipeline
from pipelines.evaluation import subject
from pipelines.evaluation.config import EvaluationConfig
from stage1_vqgan import DataConfig, Stage1Config, VQGANConfig, VQGANImageProcessor, VQGANModel
from stage1_vqgan.training import components
from stage1_vqgan.training.run import train as train_stage1
from stage2_prior import TokenLayout
from stage2_prior.prior import build_prior, num_weights
from stage2_prior.training.memory import check_training_memory, saved_activations
from tests import tiny
from tests.slow import few

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    vqgan = VQGANModel(VQGANConfig(**tiny.VQGAN))
    layout = TokenLayout(32, ("ant", "bee"), (4, 4), 4, vqgan.compute_fingerprint())
    pipe = VQGANPipeline(vqgan, build_prior(tiny.LLAMA, layout), VQGANImageProcessor(16, 1), layout)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def free(monkeypatch, count):
    """Sets the bytes that are free."""
    monkeypatch.setattr(memory, "free_memory", lambda device: count)
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: SimpleNamespace(free=0))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "codes"])
@pytest.mark.parametrize(
    ("name", "labels"), [("num_images", {}), ("num_images_per_label", {"class_labels": ["ant", 1]})]
)
def test_images_that_no_memory_holds_are_refused(pipe, output_type, name, labels):
    with pytest.raises(ValueError, match=rf"^{name}: received 1000000000000; needs at least .* [GT]B of memory, but"):
        pipe.generate(**labels, **{name: 10**12}, output_type=output_type)


@pytest.mark.parametrize(("output_type", "each"), [("pil", 128 + 256), ("np", 128 + 1024), ("codes", 128)])
def test_images_that_fit_are_generated(pipe, monkeypatch, output_type, each):
    free(monkeypatch, 3 * each)
    assert len(pipe.generate(num_images=3, output_type=output_type).codes) == 3
    with pytest.raises(ValueError, match=r"^num_images: received 4; needs at least"):
        pipe.generate(num_images=4, output_type=output_type)


def test_a_huge_batch_size_is_the_number_of_images(pipe):
    options = {"num_images": 3, "output_type": "codes"}
    huge, usual = (
        pipe.generate(**options, generator=torch.Generator().manual_seed(0), batch_size=size) for size in (10**9, 3)
    )
    assert torch.equal(huge.codes, usual.codes)


def test_an_evaluation_names_its_key(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "free_space", lambda folder: 10**9)
    config = EvaluationConfig(
        pipeline="", data=DataConfig(dataset="digits"), output_dir=str(tmp_path), samples_per_class=2**31 - 1
    )
    message = r"samples_per_class: received 2147483647; 4,294,967,294 images need .*, and .* are free; choose a smaller"
    with pytest.raises(ConfigError, match=message):
        subject.require_disk(config, pipe)
    subject.require_disk(replace(config, samples_per_class=50), pipe)


ARCHITECTURES = {
    "default": {},
    "tiny": tiny.VQGAN,
    "attention": {"attn_resolutions": [64, 16], "image_size": 64, "channel_multiplier": [2, 1, 3]},
    "deep": {"num_res_blocks": 5, "quantizer": "ema"},
    "gumbel": {"quantizer": "gumbel"},
    "simvq": {"quantizer": "simvq", "num_embeddings": 65536},
    "ibq": {"quantizer": "ibq", "num_embeddings": 65536},
    "residual": {"quantizer": "residual", "num_embeddings": 65536},
    "shared": {"quantizer": "residual", "quantizer_options": {"shared_codebook": True, "depth": 3}},
    "product": {"quantizer": "product", "num_embeddings": 65536, "quantizer_options": {"groups": 2}},
    "pyramid": {"quantizer": "pyramid", "num_embeddings": 65536},
    "switches": {"mid_attention": False, "decoder_num_res_blocks": 5, "image_size": [32, 64]},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_weights_of_a_tokenizer_are_counted_without_building_it(name):
    config = VQGANConfig(**ARCHITECTURES[name])
    with torch.device("meta"):
        exact = VQGANModel(config).num_parameters()
    assert 0.95 * exact < config.num_weights <= exact


def stage1(**changes):
    values = {
        "output_dir": "unused",
        "max_steps": 1,
        "data": dict(tiny.DATA),
        "model": dict(tiny.VQGAN),
        "loss": {"perceptual_weight": 0, "adversarial_weight": 0},
        "report_to": [],
    }
    return load_config(Stage1Config, overrides=values | changes)


@pytest.mark.parametrize("size", [{"base_channels": 10**6}, {"num_res_blocks": 10**9}, {"num_embeddings": 10**10}])
def test_a_tokenizer_that_no_memory_holds_is_refused(size):
    with pytest.raises(ConfigError, match=r"model: [\d,]+ weights and their average: needs at least"):
        components.build_tokenizer(stage1(model={**tiny.VQGAN, **size}))


def test_a_tokenizer_that_fits_is_built(monkeypatch):
    config = stage1()
    free(monkeypatch, 8 * config.vqgan_config().num_weights)
    components.build_tokenizer(config)
    free(monkeypatch, 8 * config.vqgan_config().num_weights - 1)
    with pytest.raises(ConfigError, match="model: "):
        components.build_tokenizer(config)


@pytest.mark.parametrize("bits", [40, 62])
def test_codes_that_no_memory_can_count_are_refused(tmp_path, bits):
    model = {**tiny.VQGAN, "quantizer": "bsq", "embed_dim": bits, "num_embeddings": 2**bits}
    with pytest.raises(ConfigError, match=r"model.num_embeddings: received [\d,]+; counting .* needs at least"):
        train_stage1(stage1(output_dir=str(tmp_path), model=model))


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "global_batch_size"])
def test_a_training_batch_that_no_memory_holds_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match=rf"{key}: received 1048576; one step needs at least .* GB"):
        train_stage1(stage1(output_dir=str(tmp_path), **{key: 2**20}))


def saved_bytes(call):
    """Bytes of all memory that autograd keeps for the backward of `call`, except the weights."""
    kept = {}

    def pack(tensor):
        if not tensor.is_leaf:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_the_activations_of_a_tokenizer_are_a_lower_bound(frozen):
    torch.manual_seed(0)
    model = VQGANModel(VQGANConfig(**tiny.VQGAN, dropout=0.0)).train()
    if frozen:
        model.encoder.requires_grad_(False)
    images = torch.rand(3, 1, 16, 16)
    assert 0 < 3 * components.saved_activations(model, 4) <= saved_bytes(lambda: model(images).reconstruction)


def test_the_activations_with_checkpointing_are_those_of_one_level():
    torch.manual_seed(0)
    model = VQGANModel(VQGANConfig(**tiny.VQGAN | {"image_size": [16, 32]})).train()
    without = components.saved_activations(model, 4)
    components.checkpoint_gradients(model)
    bound, level = components.saved_activations(model, 4), model.decoder.up[0]
    level.gradient_checkpointing = False
    features = torch.rand(3, 8, 16, 32, requires_grad=True)
    assert 0 < 3 * bound <= saved_bytes(lambda: level(features * 1)) and bound < without


@pytest.mark.parametrize("model_type", tiny.RANDOM_PRIORS)
def test_the_activations_of_a_prior_are_a_lower_bound(layout, model_type):
    prior = build_prior(tiny.RANDOM_PRIORS[model_type], layout).train()
    tokens = torch.zeros(3, layout.length, dtype=torch.int64)
    bound = 3 * saved_activations(prior.config, layout)
    assert 0 < bound <= saved_bytes(lambda: prior(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("model_type", tiny.RANDOM_PRIORS)
@pytest.mark.parametrize("layers", [1, 4, 7])
def test_the_weights_of_a_prior_are_counted_without_building_it(layout, model_type, layers):
    model = {**tiny.RANDOM_PRIORS[model_type], ("n_layer" if model_type == "gpt2" else "num_hidden_layers"): layers}
    assert num_weights(model, layout) == build_prior(model, layout).num_parameters()


@pytest.mark.parametrize(
    "size",
    [
        {"num_hidden_layers": 100_000},
        {"hidden_size": 10**6, "intermediate_size": 10**6, "num_attention_heads": 100},
    ],
    ids=["layers", "width"],
)
def test_a_prior_that_no_memory_holds_is_refused(layout, size):
    with pytest.raises(ConfigError, match=r"model: [\d,]+ weights: needs at least"):
        build_prior({"model_type": "llama", "hidden_size": 4096, **size}, layout)


@pytest.mark.parametrize(("batch", "key"), [(10**9, "per_device_train_batch_size"), (1, "model"), (1, None)])
def test_training_a_prior_is_compared_with_the_memory(layout, monkeypatch, batch, key):
    prior = build_prior(tiny.LLAMA, layout)
    arguments = SimpleNamespace(device=CPU, per_device_train_batch_size=batch, optim="adamw_torch")
    trainer = SimpleNamespace(is_fsdp_enabled=False, model=prior, args=arguments)
    config = SimpleNamespace(ema_decay=0.9, global_batch_size=None, per_device_train_batch_size=batch)
    needed = 4 * 4 * prior.num_parameters()  # gradient, two moments, average
    free(monkeypatch, needed - (key == "model"))
    if key is None:
        return check_training_memory(trainer, config, layout)
    with pytest.raises(ConfigError, match=f"{key}: "):
        check_training_memory(trainer, config, layout)


@pytest.mark.parametrize(
    ("value", "output_type"),
    few(itertools.product([np.nan, np.inf], ["pil", "np", "pt"]), (np.nan, "np"), (np.inf, "pil"), (np.inf, "pt")),
)
def test_pixels_that_are_not_finite_are_never_returned(pipe, monkeypatch, output_type, value):
    monkeypatch.setattr(pipe.vqgan.decoder.conv_out.bias, "data", torch.full((1,), value))
    for call in (lambda: pipe.generate(output_type=output_type), lambda: pipe.decode([[[1, 2]]], output_type)):
        with pytest.raises(ValueError, match=r"^images: received NaN or infinite values in torch.float32"):
            call()


def test_codes_of_latents_that_are_not_finite_are_never_returned(pipe, monkeypatch):
    monkeypatch.setattr(pipe.vqgan.quant_conv.bias, "data", torch.full((4,), np.nan))
    for call in (pipe.encode, pipe.reconstruct):
        with pytest.raises(FloatingPointError, match="latents are NaN or infinite"):
            call(torch.zeros(1, 16, 16))
