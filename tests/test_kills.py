"""A run that is killed at any point and started again has exactly the results of an uninterrupted run."""

import random

import pytest

from tests import kill_runs

SHORT = {
    "stage1": [("step", 11), ("write", 6), ("step", 22)],
    "stage2": [("save", 2), ("write", 9), ("step", 20)],
    "tokenize": [("shard", 1), ("shard", 4), ("shard", 6)],
}
MOST = {"step": 16, "write": 20, "save": 5, "shard": 6}


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


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_killed_at_ten_random_points(name, undisturbed, tmp_path):
    """Repeats runs, each with kills until it ends, until at least ten kills have happened."""
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
