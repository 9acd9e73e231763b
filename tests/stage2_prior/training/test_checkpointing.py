"""Files of a checkpoint that few runs have: tied and divided weights, and the scaler of float16."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from configs.checksums import Damaged
from stage2_prior.training.checkpointing import load_states, load_weights, save_states, save_weights
from tests.devices import cpu_only

pytestmark = cpu_only


def test_tied_weights_are_saved_once_and_loaded_twice(random_prior, layout, tmp_path):
    saved, loaded = (random_prior("gpt2", layout, seed, tie_word_embeddings=True) for seed in (0, 1))
    save_weights(saved, tmp_path, None)
    load_weights(loaded, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.wte.weight"]
    save_file(tensors, file)
    with pytest.raises(Damaged, match=re.escape(f"{file}: lm_head.weight: received nothing")):
        load_weights(loaded, tmp_path)


def test_divided_weights(random_prior, layout, tmp_path):
    saved, loaded = (random_prior("llama", layout, seed) for seed in (0, 1))
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_weights(loaded, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    shards[0].unlink()
    with pytest.raises(Damaged, match=r"received nothing; this run has float32"):
        load_weights(loaded, tmp_path)


def trainer(scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step), scale=None):
    """What the functions need of a Trainer after one step."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    made = SimpleNamespace(
        model=model, optimizer=SimpleNamespace(optimizer=optimizer), lr_scheduler=scheduler(optimizer)
    )
    made.accelerator = SimpleNamespace(scaler=scaler, unwrap_model=lambda model: model)
    made.is_world_process_zero = lambda: True
    return made


def step(made):
    made.model(torch.ones(3)).sum().backward()
    made.optimizer.optimizer.step()
    made.lr_scheduler.step()


class Plateau(ReduceLROnPlateau):
    """The scheduler after a loss of 1.5. Its state has an infinite number before."""

    def step(self):
        super().step(1.5)


@pytest.mark.parametrize(
    "settings", [{}, {"scale": 512.0}, {"scheduler": Plateau}], ids=["plain", "float16", "plateau"]
)
def test_states_come_back(tmp_path, settings):
    saved, loaded = trainer(**settings), trainer(**({**settings, "scale": 2.0} if "scale" in settings else settings))
    step(saved)
    save_states(saved, tmp_path)
    assert loaded.lr_scheduler.state_dict() != saved.lr_scheduler.state_dict()
    load_states(loaded, tmp_path)
    assert loaded.lr_scheduler.state_dict() == saved.lr_scheduler.state_dict()
    assert loaded.optimizer.optimizer.param_groups[0]["lr"] == saved.optimizer.optimizer.param_groups[0]["lr"]
    if "scale" in settings:
        assert loaded.accelerator.scaler.get_scale() == 512.0
        file = tmp_path / "optimizer.json"
        file.write_text(
            json.dumps({name: part for name, part in json.loads(file.read_text()).items() if name != "scaler"})
        )
        with pytest.raises(Damaged, match=r"optimizer\.json: states: received"):
            load_states(loaded, tmp_path)
