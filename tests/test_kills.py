"""Killed at any point, a run that is started again ends exactly as one that was left alone."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests import kill_runs
from tests.tiny import tensors

SHORT = {
    "stage1": [("step", 11), ("write", 6), ("step", 22)],
    "stage2": [("save", 2), ("write", 9), ("step", 20)],
    "tokenize": [("shard", 1), ("shard", 4), ("shard", 6)],
}
MOST = {"step": 16, "write": 20, "save": 5, "shard": 6}


def contents(name, folder):
    """Everything that was made: models, moving average, codebook and optimizer states; or the store's files."""
    if name == "tokenize":
        store = folder / "codes"
        manifest = json.loads((store / "manifest.json").read_text())
        del manifest["seconds"]
        return {"manifest": str(manifest), **{path.name: path.read_bytes() for path in sorted(store.glob("*.arrow"))}}
    run = folder / {"stage1": "vqgan", "stage2": "prior"}[name]
    checkpoint = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    found = {"model": load_file(run / "model.safetensors")}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = load_file(path)
        elif path.suffix in {".bin", ".pkl", ".pt"} and not path.name.startswith(("random_states", "training_args")):
            found[path.name] = torch.load(path, weights_only=True)
    return {path: leaf.numpy().tobytes() for path, leaf in tensors(found).items()}


def prepare(name, undisturbed, folder):
    """What a run needs of those before it."""
    for needed in {"stage1": [], "tokenize": ["vqgan"], "stage2": ["vqgan", "codes"]}[name]:
        shutil.copytree(undisturbed / needed, folder / needed)


def survive(name, undisturbed, folder, points):
    """Kills a run at each point in turn, until it has come to its end; returns how often it was killed.

    After the last point it is left alone.
    """
    prepare(name, undisturbed, folder)
    killed = 0
    for point, count in (*points, (None, 0)):
        code = kill_runs.run(name, folder, point, count)
        assert code in (0, -9), (folder / "log.txt").read_text()[-3000:]
        if code == 0:
            break
        killed += 1
    expected, found = contents(name, undisturbed), contents(name, folder)
    assert expected.keys() == found.keys() and len(expected) >= (6 if name == "tokenize" else 60)
    assert [path for path in expected if expected[path] != found[path]] == []
    return killed


@pytest.mark.parametrize("name", SHORT)
def test_killed_runs_end_as_undisturbed_ones(name, undisturbed, tmp_path):
    assert survive(name, undisturbed, tmp_path, SHORT[name]) == len(SHORT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_killed_at_ten_random_points(name, undisturbed, tmp_path):
    """At least: runs are killed again and again, each until it comes to its end, till there were ten kills."""
    rng = random.Random(name)
    kinds = ["shard"] if name == "tokenize" else ["step", "write", "save"]
    kills, runs = 0, 0
    while kills < 10:
        points = []
        for _ in range(5):
            kind = rng.choice(kinds)
            points += [(kind, rng.randint(1, MOST[kind])), ("seconds", rng.uniform(0.3, 2.0))]
        kills += survive(name, undisturbed, tmp_path / str(runs), points)
        runs += 1
    print(f"{name}: {kills} kills in {runs} runs")
