"""Tokens per second and MFU: counted operations against formulas and a real step; a clock that times training only."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from configs import load_config
from stage2_prior import Stage2Config, TokenLayout
from stage2_prior.training import throughput, trainer
from stage2_prior.training.run import train
from stage2_prior.training.throughput import Throughput, matmul_flops_per_second, training_flops
from stage2_prior.training.trainer import PriorTrainer
from tests.devices import DEVICE
from tests.slow import few

# N, the weights in matrices, by hand: of one layer, for models 32 wide
PER_LAYER = {
    "llama": 4 * 32 * 32 + 3 * 32 * 64,
    "gpt2": 4 * 32 * 32 + 2 * 32 * 128,
    "qwen3": 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64,  # two of four heads for keys and values
}


@pytest.mark.parametrize("model_type", few(PER_LAYER, "llama"))
def test_operations_are_those_of_the_formula_and_of_a_real_step(random_prior, layout, model_type):
    prior = random_prior(model_type, layout)
    operations = training_flops(prior.config, layout.length)
    matrices = 2 * PER_LAYER[model_type] + 32 * layout.vocab_size
    # the angles of rotary positions are a product as well, of a few numbers, in older versions of transformers
    assert operations == pytest.approx(6 * matrices + 12 * 2 * 32 * layout.length, rel=1e-3)
    prior.set_attn_implementation("eager")
    tokens = torch.arange(3 * layout.length, device=DEVICE).view(3, -1) % layout.vocab_size
    with FlopCounterMode(display=False) as counter:
        prior(input_ids=tokens, labels=tokens).loss.backward()
    assert operations * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_counting_touches_neither_the_model_nor_the_random_numbers(random_prior, layout):
    config, state = random_prior("llama", layout).config, torch.get_rng_state()
    before = config.to_dict()
    training_flops(config, layout.length)
    assert config.to_dict() == before and config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)


def test_operations_that_depend_on_data_are_refused():
    experts = AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(RuntimeError):
        training_flops(experts, 16)


def test_the_clock_runs_from_the_first_token_and_stands_still_in_pauses(monkeypatch):
    now = 0.0
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Throughput(torch.device("cpu"))
    now = 100.0  # before the first step
    for tokens, seconds in [(10, 2.0), (30, 3.0)]:
        clock.count(tokens)
        now += seconds
    with clock.paused():
        now += 50
    clock.count(60)
    now += 5
    with clock.paused():
        assert clock.tokens_per_second() == 100 / 10
        now += 50
    now += 1  # reading data
    clock.count(8)
    now += 3
    with clock.paused():
        assert clock.tokens_per_second() == 8 / 4


def metrics(folder: str | Path) -> list[dict[str, float]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [logs for logs in map(json.loads, lines) if "loss" in logs]


def test_a_run_counts_its_own_tokens_and_the_time_of_training(tiny_runs, stage2_values, tmp_path, monkeypatch):
    values = stage2_values(tmp_path, tiny_runs.vqgan, code_store=str(tiny_runs.codes), max_steps=6, logging_steps=2)
    changes = {"eval_steps": 1, "save_steps": 3, "gradient_accumulation_steps": 2}
    config = load_config(Stage2Config, overrides={**values, **changes})
    counted, away, products = [], 0.0, []
    rate, evaluate, save = Throughput.tokens_per_second, PriorTrainer.evaluate, PriorTrainer._save_checkpoint

    def counting(self: Throughput) -> float:
        counted.append(self.tokens)
        return rate(self)

    def measured(*args) -> float:
        products.append(matmul_flops_per_second(*args))
        return products[-1]

    def long(method):
        def after_an_hour(*args, **kwargs):
            nonlocal away
            away += 3600
            return method(*args, **kwargs)

        return after_an_hour

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + away))
    monkeypatch.setattr(Throughput, "tokens_per_second", counting)
    monkeypatch.setattr(trainer, "matmul_flops_per_second", measured)
    monkeypatch.setattr(PriorTrainer, "evaluate", long(evaluate))
    monkeypatch.setattr(PriorTrainer, "_save_checkpoint", long(save))
    train(config)
    of_a_step = 2 * 64 * 16
    assert counted == [2 * of_a_step] * 3
    for logs in metrics(config.output_dir):
        assert logs["tokens_per_second"] > 2 * of_a_step / 60
        layout = TokenLayout.from_pretrained(config.output_dir)
        prior = AutoConfig.from_pretrained(config.output_dir)
        ideal = products[0] / training_flops(prior, layout.length)
        assert logs["mfu"] == pytest.approx(logs["tokens_per_second"] / ideal)

    (tmp_path / "prior" / "train_results.json").unlink()
    shutil.rmtree(f"{config.output_dir}/checkpoint-6")
    counted.clear()
    train(config)
    assert counted == [of_a_step, 2 * of_a_step]  # from step 3: logs at steps 4 and 6
