"""The non-public functions of torch and transformers that the package calls still exist and behave as needed."""

import gc
import inspect
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, Trainer
from transformers.integrations import TrackioCallback, WandbCallback

from pipelines.build import BuildConfig
from stage2_prior import compat
from stage2_prior.training.trackers import SettingsOnTrackers, track_image
from stage2_prior.training.trainer import PriorTrainer

CONFIG = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)


def test_the_cache_argument_is_one_that_forward_takes():
    prior = AutoModelForCausalLM.from_config(CONFIG)
    assert compat.cache_argument(prior) in inspect.signature(type(prior).forward).parameters


def test_the_attention_interface_is_known():
    assert compat.uses_attention_interface(AutoModelForCausalLM.from_config(CONFIG)) is True


def test_the_attention_of_a_model_is_the_one_it_was_given():
    prior = AutoModelForCausalLM.from_config(CONFIG)
    for name in ("eager", "sdpa"):
        prior.set_attn_implementation(name)
        assert compat.attention_of(prior) == name


def test_operations_without_data_are_counted():
    with compat.without_data(), FlopCounterMode(display=False) as counter:
        torch.empty(2**20, 2**20) @ torch.empty(2**20, 2**20)  # needs terabytes with data
    assert counter.get_total_flops() == 2 * 2**60


@pytest.mark.parametrize(("name", "kind"), [("wandb", WandbCallback), ("trackio", TrackioCallback)])
def test_pictures_and_settings_reach_the_run_that_trainer_has_opened(monkeypatch, name, kind):
    """The callback keeps the module wandb in `_wandb`, or None if logging is off; and trackio in `_trackio`."""
    logged: list = []
    settings: dict = {}
    config = SimpleNamespace(update=lambda values, allow_val_change: settings.update(values))
    fake = SimpleNamespace(Image=lambda pixels: pixels.shape, log=logged.append, config=config)
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: True)
    monkeypatch.setitem(sys.modules, name, fake)
    callback = kind()
    assert compat.tracker_of(callback) is fake and compat.tracker_of(PrinterCallback()) is None
    track_image([callback, PrinterCallback()], "samples", Image.new("L", (3, 2)), 7)
    assert logged == [{"samples": (2, 3, 3), "train/global_step": 7}]
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[PrinterCallback(), callback]))
    SettingsOnTrackers(trainer, BuildConfig(tokenizer="a", prior="b", output_dir="c")).on_train_begin(
        None, SimpleNamespace(is_world_process_zero=True), None
    )
    assert settings["config"]["tokenizer"] == "a"


def test_a_trace_repeats_operations_on_other_inputs_and_shapes():
    def scale(x, offset):
        return x * x.shape[0] + x[:, : offset + 1].sum()  # the trace must not fix sizes and values as constants

    traced = compat.trace(scale, (torch.ones(2, 3), torch.tensor(1)))
    x, offset = torch.randn(5, 3), torch.tensor(2)
    torch.testing.assert_close(traced(x, offset), scale(x, offset))


def test_a_trace_keeps_nothing_alive():
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    traced = compat.trace(model.forward, (torch.ones(4),))
    torch.testing.assert_close(traced(torch.ones(4)), model(torch.ones(4)))
    kept = weakref.ref(model.weight)
    del model, traced
    gc.collect()
    assert kept() is None


def test_more_recompiles_are_allowed_inside():
    before = torch._dynamo.config.recompile_limit
    with compat.allow_recompiles(before + 5):
        assert torch._dynamo.config.recompile_limit == before + 5
    assert torch._dynamo.config.recompile_limit == before


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_argument_warns_of_nothing():
    from stage2_prior.sampling.decoder import EagerDecoder

    decoder = EagerDecoder(AutoModelForCausalLM.from_config(CONFIG).eval(), 1, 2)
    with torch.inference_mode():
        decoder.read(slice(0, 1), torch.zeros(1, 1, dtype=torch.int64), 0)


def test_trainer_calls_the_non_public_methods_that_ours_replaces():
    """Otherwise Trainer would write pickles again, or would save elsewhere."""
    source = inspect.getsource(Trainer)
    replaced = [name for name in vars(PriorTrainer) if name.startswith("_") and hasattr(Trainer, name)]
    saving = {f"_{verb}_{what}" for verb in ("save", "load") for what in ("optimizer_and_scheduler", "rng_state")}
    assert saving | {"_save", "_save_checkpoint", "_load_from_checkpoint", "_get_output_dir"} <= set(replaced)
    ours = [name for name in replaced if not name.startswith("__")]
    assert [name for name in ours if f"self.{name}(" not in source] == []
