"""The training of the prior: resuming, saved files, metrics, and invalid configurations."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from configs import ConfigError, load_config
from configs.checkpoints import complete_checkpoints
from configs.interruption import Diverged
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from stage1_vqgan import VQGANImageProcessor, VQGANModel
from stage2_prior import CodeStore, Stage2Config, TokenLayout
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train
from stage2_prior.training.trainer import PriorTrainer, bits_per_pixel
from tests.resealing import edit_manifest
from tests.slow import few


@pytest.fixture
def make_config(tiny_runs, tmp_path, stage2_values) -> Callable[..., Stage2Config]:
    """Makes the configuration of a run over the codes of `tiny_runs`."""

    def make(**changes) -> Stage2Config:
        values = stage2_values(tmp_path, tiny_runs.vqgan, code_store=str(tiny_runs.codes), max_steps=2)
        return load_config(Stage2Config, overrides={**values, **changes})

    return make


def test_a_resumed_run_equals_a_straight_one(make_config, tmp_path):
    config = make_config(max_steps=6, save_steps=3, eval_steps=2, condition_dropout=0.2, lr_scheduler_type="cosine",
                         gradient_accumulation_steps=2, **{"model.attention_dropout": 0.1})  # fmt: skip
    train(config)
    straight = tmp_path / "straight"
    shutil.copytree(config.output_dir, straight)
    run = tmp_path / "prior"
    shutil.rmtree(run / "checkpoint-6")
    for name in ("model.safetensors", "train_results.json"):
        (run / name).unlink()
    (run / "checkpoint-5").mkdir()  # a checkpoint that was interrupted while it was written
    train(config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]  # no evaluation is logged twice
    assert (run / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    results, straight_results = (json.loads((path / "train_results.json").read_text()) for path in (run, straight))
    assert results["eval_loss"] == straight_results["eval_loss"] and results["global_step"] == 6


def test_dropout_of_conditions_and_attention_matter(make_config, tmp_path):
    """Otherwise, the equality above would not test them."""
    weights = [
        train(make_config(output_dir=str(tmp_path / name), **changes)).lm_head.weight
        for name, changes in [
            ("plain", {}),
            ("conditions", {"condition_dropout": 0.9}),
            ("attention", {"model.attention_dropout": 0.5}),
        ]
    ]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_finished_run_is_left_alone(tiny_runs):
    before = {path: path.stat().st_mtime_ns for path in tiny_runs.prior.rglob("*")}
    prior = train(tiny_runs.stage2)
    assert {path: path.stat().st_mtime_ns for path in tiny_runs.prior.rglob("*")} == before
    saved = AutoModelForCausalLM.from_pretrained(tiny_runs.prior)
    assert torch.equal(prior.lm_head.weight, saved.lm_head.weight)


def test_other_settings_in_the_same_folder_are_refused(make_config, tiny_runs):
    with pytest.raises(ConfigError, match=r"learning_rate: the run was started with 0\.003, now it is 0\.1"):
        train(make_config(output_dir=str(tiny_runs.prior), max_steps=20, learning_rate=0.1))


def test_training_learns(tiny_runs):
    lines = [json.loads(line) for line in (tiny_runs.prior / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] < 1.02 * math.log(64)  # a new prior is nearly uniform: log of the vocabulary size


@torch.no_grad()
def test_reported_figures_are_means_over_the_validation_images(tiny_runs):
    results = json.loads((tiny_runs.prior / "train_results.json").read_text())
    prior = AutoModelForCausalLM.from_pretrained(tiny_runs.prior)
    codes, labels = CodeStore(tiny_runs.codes).split("validation").read(np.arange(360))[:2]
    sequences = torch.from_numpy(np.concatenate([32 + labels[:, None], codes], 1))
    probabilities = prior(input_ids=sequences[:, :-1]).logits.double().softmax(-1)
    nats = -probabilities.gather(2, sequences[:, 1:, None]).log()
    assert results["eval_loss"] == pytest.approx(nats.mean().item(), rel=1e-5)  # 360 images in batches of 100
    bits_of_an_image = nats.sum(1).mean().item() / math.log(2)
    assert results["bits_per_pixel"] == pytest.approx(bits_of_an_image / 16**2, rel=1e-5)


def test_bits_per_pixel():
    layout = TokenLayout(1024, (), (16, 16), 16, "")
    assert bits_per_pixel(math.log(1024), layout) == pytest.approx(10 / 16**2)  # 10 bits for each 16×16 pixels
    assert bits_per_pixel(0.0, layout) == 0


def test_generation_config_lets_only_codes_through(tiny_runs):
    config = json.loads((tiny_runs.prior / "generation_config.json").read_text())
    assert config["suppress_tokens"] == list(range(32, 64))
    assert (config["top_k"], config["max_new_tokens"]) == (0, 16)
    assert [config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [None] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_hiden_layers": 3}, r"model\.num_hiden_layers: .*did you mean 'num_hidden_layers'\?"),
        ({"model.model_type": "lama"}, r"model\.model_type: received 'lama'; .*did you mean 'llama'\?"),
        ({"model": {"hidden_size": 8}}, r"model\.model_type: "),
        ({"model.vocab_size": 99}, r"model\.vocab_size: .*the code store determines it"),
        ({"model.max_position_embeddings": 99}, r"model\.max_position_embeddings: .*the code store determines it"),
        ({"training_arguments.lable_smoothing_factor": 0.1}, r"did you mean 'label_smoothing_factor'\?"),
        ({"training_arguments.learning_rate": 0.1}, r"training_arguments\.learning_rate: .*at the top level"),
        ({"condition_droput": 0.1}, r"condition_droput: .*did you mean 'condition_dropout'\?"),
        ({"condition_dropout": 1.5}, r"condition_dropout: received 1\.5"),
        ({"num_views": 0}, r"num_views: received 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_cannot_work(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


@pytest.mark.parametrize("changes", [{"model.hidden_size": 33}, {"model.hidden_size": "wide"}], ids=str)
def test_a_model_that_cannot_be_built_is_a_message(make_config, changes):
    with pytest.raises(ConfigError, match=r"model.*hidden.size"):
        train(make_config(**changes))


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
        {"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 2},
    ],
    ids=lambda model: model["model_type"],
)
def test_models_that_look_ahead_or_keep_no_keys_are_refused(make_config, model):
    """A prior without a causal mask sees the code to predict. A prior without keys and values cannot use the cache."""
    with pytest.raises(ConfigError, match=rf"model\.model_type: received '{model['model_type']}'"):
        train(make_config(model=model))


def test_training_arguments_reach_the_trainer(make_config, tmp_path):
    weights = [
        train(make_config(output_dir=str(tmp_path / str(epsilon)), **{"training_arguments.adam_epsilon": epsilon}))
        for epsilon in (1e-8, 1.0)
    ]
    assert not torch.equal(*(prior.lm_head.weight for prior in weights))


@pytest.mark.parametrize("model_type", few(["gpt2", "qwen3"], "gpt2"))
def test_an_architecture_is_a_name(make_config, tiny_runs, model_type):
    models = {
        "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
        "qwen3": {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64},
    }  # fmt: skip
    config = make_config(model=models[model_type])
    train(config)
    saved = AutoModelForCausalLM.from_pretrained(config.output_dir)
    assert saved.config.model_type == model_type
    assert (saved.config.vocab_size, saved.config.max_position_embeddings) == (64, 16)
    pipeline_folder = config.output_dir + "_pipeline"
    pipeline = build(BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=config.output_dir, output_dir=pipeline_folder))
    first, again = (
        pipe.generate([3], guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="codes").codes
        for pipe in (pipeline, VQGANPipeline.from_pretrained(pipeline_folder))
    )
    assert torch.equal(first, again)


def test_the_road_without_labels(make_config, tiny_runs, tmp_path):
    config = make_config(code_store=str(tmp_path / "codes"), num_views=1, **{"data.use_labels": False})
    layout = tokenize(config).layout
    assert (layout.class_names, layout.null_token) == ((), 32)
    train(config)
    build(BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=config.output_dir, output_dir=str(tmp_path / "pipeline")))
    pipeline = VQGANPipeline.from_pretrained(tmp_path / "pipeline")
    out = pipeline.generate(num_images=3, generator=torch.Generator().manual_seed(0))
    assert len(out.images) == 3 and out.images[0].size == (16, 16) and len(out.codes.unique(dim=0)) == 3
    with pytest.raises(ValueError, match="class_labels: this prior has no classes; leave it out"):
        pipeline.generate(class_labels=[0])
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "always token 32" in card and "num_images=4" in card and "class" not in card.split("---", 2)[2].lower()


@pytest.mark.parametrize("wanted", ["none", "checkpoint-7"])
def test_checkpoints_that_cannot_be_gone_on_from(make_config, tmp_path, wanted):
    (tmp_path / "prior" / "checkpoint-1").mkdir(parents=True)
    marker = tmp_path / "prior" / "checkpoint-1" / "complete.json"
    marker.write_text('{"step": 1, "num_processes": 1, "seconds": 0}')
    with pytest.raises(ConfigError, match="resume_from_checkpoint: received"):
        train(make_config(resume_from_checkpoint=wanted, allow_config_changes=True))


@pytest.mark.parametrize("changes", [{"num_views": 5}, {"data.use_labels": False}], ids=str)
def test_codes_that_are_not_those_of_the_configuration_are_refused(make_config, changes):
    with pytest.raises(ConfigError, match=next(iter(changes)) + r": .* was written with"):
        train(make_config(**changes))


def test_a_run_keeps_to_the_codes_of_its_tokenizer(make_config, tiny_runs, tmp_path):
    """A prior on the codes of an old tokenizer must not get the fingerprint of a new tokenizer in the same folder."""
    store, run = tmp_path / "codes", tmp_path / "run"
    shutil.copytree(tiny_runs.codes, store)
    config = make_config(code_store=str(store), output_dir=str(run), tokenizer=str(tmp_path / "gone"))
    train(config)
    fingerprint = TokenLayout.from_pretrained(run).tokenizer_fingerprint
    edit_manifest(store, lambda values: values.update(json.loads(json.dumps(values).replace(fingerprint, "another"))))
    for unfinished in (False, True):
        if unfinished:
            (run / "train_results.json").unlink()
        with pytest.raises(ConfigError, match="another tokenizer"):
            train(config)
    with pytest.raises(ConfigError, match="tokenizer: received"):
        train(replace(config, tokenizer=str(tiny_runs.vqgan), output_dir=str(tmp_path / "new")))


def test_a_prior_without_condition_dropout_has_no_null_token(make_config, tiny_runs):
    config = make_config(condition_dropout=0.0)
    prior = train(config)
    pipe = VQGANPipeline(
        VQGANModel.from_pretrained(tiny_runs.vqgan),
        prior,
        VQGANImageProcessor.from_pretrained(tiny_runs.vqgan),
        TokenLayout.from_pretrained(config.output_dir),
    )
    assert len(pipe.generate(class_labels=[3]).images) == 1
    for arguments in ({"class_labels": [3], "guidance_scale": 2.0}, {"num_images": 2}):
        with pytest.raises(ValueError, match="not learnt the null token"):
            pipe.generate(**arguments)


def test_a_run_whose_numbers_overflow_ends_and_saves_nothing_of_it(make_config):
    """A much too high learning rate makes the run diverge. Trainer would hide such a loss by default."""
    config = make_config(learning_rate=1e30, max_grad_norm=0, max_steps=30, save_steps=25)
    with pytest.raises(Diverged, match=r"the loss was not finite at step \d+ .*no checkpoint was saved yet"):
        train(config)
    assert complete_checkpoints(config.output_dir) == []


def test_a_weight_that_is_not_finite_is_not_saved(make_config, monkeypatch):
    step = PriorTrainer.training_step

    def broken(trainer, *args, **kwargs):
        loss = step(trainer, *args, **kwargs)
        if trainer.state.global_step == 5:
            trainer.model.lm_head.weight.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(PriorTrainer, "training_step", broken)
    config = make_config(max_steps=6, save_steps=3, max_grad_norm=0, logging_steps=100)
    with pytest.raises(Diverged, match=r"a weight is not finite .*the last good checkpoint is .*checkpoint-3\."):
        train(config)
    assert [checkpoint.step for checkpoint in complete_checkpoints(config.output_dir)] == [3]


def test_a_moment_that_is_not_finite_is_not_saved(make_config, monkeypatch):
    """An infinite moment leaves its weight as it is, so the weights stay finite; but a checkpoint of it is refused."""
    require_finite = PriorTrainer.require_finite

    def broken(trainer):
        require_finite(trainer)
        if trainer.state.global_step == 4:
            trainer.optimizer.state[trainer.model.lm_head.weight]["exp_avg_sq"][0, 0] = math.inf

    monkeypatch.setattr(PriorTrainer, "require_finite", broken)
    with pytest.raises(
        Diverged, match=r"the state of the optimizer is not finite .*the last good checkpoint is .*-2\."
    ):
        train(make_config(max_steps=4, save_steps=2))


def test_the_log_counts_epochs_of_the_data(make_config):
    config = make_config(max_steps=50, logging_steps=25)
    train(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line)["epoch"] for line in lines if '"loss"' in line]
    assert epochs == pytest.approx([25 * 64 / 2874, 50 * 64 / 2874])


def test_the_private_methods_of_trainer_that_are_overridden_exist():
    """If a new version of transformers renames a method, Trainer no longer calls our override, without an error."""
    own = {"_loader", "_diverged", "_ideal_tokens_per_second", "_model", "_require_finite_moments", "_checkpoint_size"}
    overridden = {name for name in vars(PriorTrainer) if name.startswith("_") and not name.startswith("__")} - own
    states = {
        f"_{verb}_{part}" for verb in ("save", "load") for part in ("optimizer_and_scheduler", "scaler", "rng_state")
    }
    others = {"_get_output_dir", "_load_from_checkpoint", "_maybe_log_save_evaluate", "_save", "_save_checkpoint"}
    assert states | others <= overridden
    assert [name for name in overridden if not callable(getattr(Trainer, name, None))] == []
