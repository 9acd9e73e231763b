"""A run that is killed at any point and started again has exactly the results of an uninterrupted run."""

import functools
import random
import shutil

import pytest

from tests import kill_runs
from tests.slow import few

FINAL = {"stage1": 28, "stage2": 17, "build": 53}  # calls of "final" in a run that replaces a model
SHORT = {
    "stage1": [("step", 11), ("write", 6)],
    "stage2": [("save", 2), ("step", 20)],
    "tokenize": [("shard", 4), ("shard", 6)],
    "build": [("final", 6), ("final", 21)],
}
MOST = {"final": 30, "step": 16, "write": 20, "save": 5, "shard": 6}


def survive(name, undisturbed, folder, points):
    """Starts a run until it ends, and kills it at the next point each time; returns the number of kills.

    After the last point it runs without kills.
    """
    kill_runs.prepare(name, undisturbed, folder)
    killed = 0
    for point, count in (*points, (None, 0)):
        code = kill_runs.run(name, folder, point, count)
        assert code in (0, -9), (folder / "log.txt").read_text()[-3000:]
        if code == 0:
            break
        killed += 1
    assert kill_runs.differences(name, undisturbed, folder) == []
    return killed


@pytest.mark.parametrize("name", SHORT)
def test_killed_runs_end_as_undisturbed_ones(name, undisturbed, tmp_path):
    assert survive(name, undisturbed, tmp_path, SHORT[name]) == len(SHORT[name])


@pytest.fixture(scope="module")
def changed(undisturbed, tmp_path_factory):
    """Returns the weights of the models when a finished run is lengthened, or a pipeline built from other models."""
    root = tmp_path_factory.mktemp("changed")

    def weights(name):
        folder = shutil.copytree(undisturbed, root / name)
        assert kill_runs.run(f"{name}/changed", folder) == 0, (folder / "log.txt").read_text()[-3000:]
        return kill_runs.weights(name, folder)

    return functools.cache(weights)


def replace_model(name, count, old, new, undisturbed, folder):
    """Kills the save of a new model over an old one; returns whether the folder then loads as the new one."""
    shutil.copytree(undisturbed, folder)
    assert kill_runs.run(f"{name}/changed", folder, "final", count) == -9, (folder / "log.txt").read_text()[-3000:]
    found = kill_runs.weights(name, folder)
    assert found in (old, new)
    assert kill_runs.run(f"{name}/changed", folder) == 0, (folder / "log.txt").read_text()[-3000:]
    assert kill_runs.weights(name, folder) == new
    return found == new


@pytest.mark.parametrize("count", few([3, 12], 12))
def test_a_killed_save_leaves_the_old_or_the_new_model(count, undisturbed, changed, tmp_path):
    """The first kill comes before the new files count, the second one while they replace the old ones."""
    old, new = kill_runs.weights("build", undisturbed), changed("build")
    assert old != new
    assert replace_model("build", count, old, new, undisturbed, tmp_path / "run") == (count == 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", FINAL)
def test_thirty_kills_of_final_saves(name, undisturbed, changed, tmp_path):
    old, new, rng = kill_runs.weights(name, undisturbed), changed(name), random.Random(name)
    assert old != new
    counts = [rng.randint(1, FINAL[name]) for _ in range(10)]
    found = [replace_model(name, count, old, new, undisturbed, tmp_path / str(n)) for n, count in enumerate(counts)]
    print(f"{name}: {found.count(False)} kills left the old model, {found.count(True)} the new one")
    assert set(found) == {False, True}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_killed_at_ten_random_points(name, undisturbed, tmp_path):
    """Repeats runs, each with kills until it ends, until at least ten kills have happened."""
    rng = random.Random(name)
    kinds = {"tokenize": ["shard"], "build": ["final"]}.get(name, ["step", "write", "save", "final"])
    kills, runs = 0, 0
    while kills < 10:
        points = []
        for _ in range(5):
            kind = rng.choice(kinds)
            points += [(kind, rng.randint(1, MOST[kind])), ("seconds", rng.uniform(0.3, 2.0))]
        kills += survive(name, undisturbed, tmp_path / str(runs), points)
        runs += 1
    print(f"{name}: {kills} kills in {runs} runs")
