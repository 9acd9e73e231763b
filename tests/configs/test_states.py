"""States are saved in safetensors and JSON and come back unchanged; damaged ones are refused, naming file and entry."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from configs.checksums import Damaged
from configs.optimizer_states import load_optimizer_state, optimizer_state
from configs.states import read_state, read_tensors, refuse_pickles, require_like, require_values_like, write_state


def test_a_state_comes_back(tmp_path):
    tensors = {"a.b": torch.randn(3, 2), "step": torch.tensor(7.0)}
    state = {"state": {"layer.weight": {**tensors, "count": 3}}, "list": [1, 0.1, None, "cosine", True, math.inf]}
    write_state(tmp_path / "optimizer", state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimizer.json", "optimizer.safetensors"]
    found = read_state(tmp_path / "optimizer")
    loaded = found["state"]["layer.weight"]
    assert all(torch.equal(loaded.pop(name), value) for name, value in tensors.items())
    assert found == {"state": {"layer.weight": {"count": 3}}, "list": state["list"]}
    with pytest.raises(TypeError, match="/a: received a object; a state holds tensors and plain values"):
        write_state(tmp_path / "other", {"a": object()})


def without(tensors, name):
    return {other: value for other, value in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: without(tensors, "/a"), r"s\.safetensors: /a: received nothing; float32 \[2, 3\] was saved"),
        (lambda tensors: {**tensors, "/a": torch.ones(3, 2)}, r"/a: received float32 \[3, 2\]; float32 \[2, 3\] was"),
        (lambda tensors: {**tensors, "/a": torch.ones(2, 3).half()}, r"/a: received float16 \[2, 3\]"),
        (lambda tensors: {**tensors, "/c": torch.ones(1)}, r"/c: s\.json does not know this entry"),
        (lambda tensors: {**tensors, "/a": torch.full((2, 3), math.nan)}, "/a: not all numbers are finite"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, damage, message):
    write_state(tmp_path / "s", {"a": torch.ones(2, 3), "b": [torch.zeros(2), 1]})
    file = tmp_path / "s.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    save_file(damage(tensors), file)
    with pytest.raises(Damaged, match=message):
        read_state(tmp_path / "s")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"a": 1}', '{"a": {"tensor": [1]}}', '{"a":' * 900 + "1" + "}" * 900]
)
def test_damaged_values_are_refused(tmp_path, content):
    write_state(tmp_path / "s", {"a": torch.ones(2, 3)})
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(Damaged, match=r"s\.(json|safetensors): "):
        read_state(tmp_path / "s")


@pytest.mark.parametrize("name", ["s.json", "s.safetensors"])
def test_missing_files_are_named(tmp_path, name):
    write_state(tmp_path / "s", {"a": 1})
    (tmp_path / name).unlink()
    with pytest.raises(Damaged, match=rf"{name}: this file is missing"):
        read_state(tmp_path / "s")


def test_a_file_of_another_kind_is_no_safetensors(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(Damaged, match=r"s\.safetensors: this file is damaged"):
        read_tensors(tmp_path / "s.safetensors")


def test_tensors_must_be_those_of_the_run(tmp_path):
    like = {"a": torch.ones(2), "b": torch.ones(3)}
    require_like({name: value + 1 for name, value in like.items()}, like, tmp_path)
    for saved, message in [
        ({"a": torch.ones(2)}, r"b: received nothing; this run has float32 \[3\]"),
        ({**like, "c": torch.ones(1)}, r"c: received float32 \[1\]; this run has nothing"),
        ({**like, "a": torch.ones(2, 1)}, r"a: received float32 \[2, 1\]; this run has float32 \[2\]"),
    ]:
        with pytest.raises(Damaged, match=message):
            require_like(saved, like, tmp_path)


LIKE = {"lr": 0.1, "betas": (0.9, 0.99), "fused": True, "mode": "min", "best": math.inf, "lambdas": [{}], "free": None}
SAVED = {"lr": 1, "betas": [0.8, 0.9], "fused": False, "mode": "min", "best": 3.5, "lambdas": [{}], "free": "any"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "0.1"),
        ("lr", True),
        ("lr", math.nan),
        ("lr", -math.inf),
        ("lr", 10**400),
        ("lr", None),
        ("betas", [0.9]),
        ("betas", {"0": 0.9, "1": 0.9}),
        ("fused", 1),
        ("mode", "max"),
        ("lambdas", [{"x": 1}]),
        ("lambdas", []),
        ("other", 1),
    ],
    ids=str,
)
def test_values_must_be_like_those_of_the_run(tmp_path, key, value):
    require_values_like(SAVED, LIKE, tmp_path, "scheduler")
    with pytest.raises(Damaged, match=r"scheduler.*: received .*; this run has"):
        require_values_like({**SAVED, key: value}, LIKE, tmp_path, "scheduler")


def make(kind=torch.optim.AdamW, shape=(4, 2, 3, 3), **settings):
    """A convolution in `channels_last` with its optimizer, and a function that takes a step."""
    torch.manual_seed(0)
    model = nn.Conv2d(shape[1], shape[0], shape[2]).to(memory_format=torch.channels_last)
    optimizer = kind(model.parameters(), lr=0.1, **settings)

    def step(number):
        optimizer.zero_grad()
        images = torch.randn(2, shape[1], 5, 5, generator=torch.Generator().manual_seed(number))
        model(images.to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()

    return model, optimizer, step


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adafactor, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_optimizer_goes_on_exactly(tmp_path, kind, settings):
    """Also with moments in `channels_last`, whose memory fused optimizers combine element by element."""
    model, optimizer, step = make(kind, **settings)
    step(1)
    write_state(tmp_path / "optimizer", optimizer_state(optimizer, dict(model.named_parameters())))
    again, other, step_again = make(kind, **settings)
    again.load_state_dict(model.state_dict())
    saved = read_state(tmp_path / "optimizer")
    load_optimizer_state(saved, other, dict(again.named_parameters()), tmp_path)
    step(2)
    step_again(2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))
    assert optimizer.param_groups[0].keys() == other.param_groups[0].keys()
    assert all(optimizer.param_groups[0][key] == other.param_groups[0][key] for key in settings | {"lr": 0})


def test_an_optimizer_without_a_step_has_no_states(tmp_path):
    model, optimizer, _ = make()
    write_state(tmp_path / "optimizer", optimizer_state(optimizer, dict(model.named_parameters())))
    load_optimizer_state(read_state(tmp_path / "optimizer"), optimizer, dict(model.named_parameters()), tmp_path)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"].pop("bias"), "state: bias: this parameter is missing or unknown"),
        (lambda saved: saved["state"].update(other={}), "state: other: this parameter is missing or unknown"),
        (lambda saved: saved["state"]["bias"].update(exp_avg=torch.ones(3)), r"bias/exp_avg: received \[3\]; .* \[4\]"),
        (lambda saved: saved.update(state=[1]), "state: must map parameters"),
        (lambda saved: saved.update(state={"bias": 1, "weight": 2}), "state: must map parameters"),
        (lambda saved: saved.pop("groups"), "optimizer: received"),
        (lambda saved: saved["groups"][0].pop("eps"), "optimizer/groups/0: received"),
        (lambda saved: saved["groups"][0]["params"].reverse(), "optimizer/groups/0/params/0: received 'bias'"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(tmp_path, change, message):
    model, optimizer, step = make()
    step(1)
    write_state(tmp_path / "optimizer", optimizer_state(optimizer, dict(model.named_parameters())))
    saved = read_state(tmp_path / "optimizer")
    change(saved)
    with pytest.raises(Damaged, match=message):
        load_optimizer_state(saved, optimizer, dict(model.named_parameters()), tmp_path / "optimizer.json")


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "best/pytorch_model.bin", ".metadata", "random_states_0.pkl", "README"]
)
def test_other_files_are_refused_by_name(tmp_path, name):
    (tmp_path / "best").mkdir()
    for known in ("complete.json", "model.safetensors", "best/config.json"):
        (tmp_path / known).write_text(json.dumps({}))
    refuse_pickles(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(Damaged, match=rf"{name}: this project writes no pickles"):
        refuse_pickles(tmp_path)
