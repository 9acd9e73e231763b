"""The state of an optimizer as a checkpoint holds it: by the names of the parameters, see states.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from configs.checksums import Damaged
from configs.states import fill, require_values_like


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """`{"state": {parameter: its state}, "groups": [settings and names of the parameters]}`.

    Args:
        optimizer: of torch, not accelerate's wrapper.
        parameters: by name; there may be more of them than the optimizer has.
    """
    members = _members(optimizer, parameters)
    states = {name: optimizer.state[parameter] for name, parameter in members.items() if parameter in optimizer.state}
    return {"state": states, "groups": _groups(optimizer, list(members))}


def load_optimizer_state(
    saved: dict[str, Any], optimizer: Optimizer, parameters: Mapping[str, Tensor], path: Path
) -> None:
    """Loads what `optimizer_state` returned, after `write_state` and `read_state`.

    Raises:
        Damaged: it is the state of other parameters, or of an optimizer of another kind. The message names the file
            `path`.
    """
    members = _members(optimizer, parameters)
    own = _groups(optimizer, list(members))
    require_values_like(saved, {"state": None, "groups": own}, path, "optimizer")
    states = saved["state"]
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise Damaged(f"{path}: state: must map parameters to their states")
    if states and states.keys() != members.keys():  # without any, the optimizer has made no step yet
        raise Damaged(f"{path}: state: {min(states.keys() ^ members.keys())}: this parameter is missing or unknown")

    numbers = {name: number for number, name in enumerate(members)}  # torch's names of the parameters
    placed = {
        numbers[name]: {
            key: _placed(value, members[name], optimizer, path, f"{name}/{key}") for key, value in state.items()
        }
        for name, state in states.items()
    }
    groups = [
        {**_with_tuples(group, like), "params": [numbers[name] for name in group["params"]]}
        for group, like in zip(saved["groups"], own, strict=True)
    ]
    optimizer.load_state_dict({"state": placed, "param_groups": groups})


def _with_tuples(group: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """A group with tuples where `like` has tuples, because JSON has only lists."""
    return {key: tuple(value) if isinstance(like[key], tuple) else value for key, value in group.items()}


def _members(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of an optimizer by name, in the order of its groups."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}


def _groups(optimizer: Optimizer, names: list[str]) -> list[dict[str, Any]]:
    """The groups of an optimizer, with the names of their parameters; `names` are those of all groups in order."""
    rest = iter(names)
    return [{**group, "params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups]


def _placed(value: Any, parameter: Tensor, optimizer: Optimizer, path: Path, place: str) -> Any:
    """A value of a parameter's state. A tensor of the parameter's shape gets its device, memory format and sharding.

    Without the memory format, fused optimizers would combine the wrong elements.
    """
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        fill(placed, value)
        return placed
    if value.ndim and isinstance(optimizer, Adam):
        raise Damaged(f"{path}: {place}: received {list(value.shape)}; the parameter has {list(parameter.shape)}")
    return value.clone()  # the file is mapped into memory
