"""Two processes equal one with twice the batch; all processes hold the same weights; a dead process ends the job."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import GradientState

from stage2_prior import CodeStore
from tests import forks, process_runs
from tests.devices import ON_CPU, cpu_only
from tests.tiny import tensors

pytestmark = cpu_only

ROOT = Path(__file__).resolve().parents[1]
# One and two processes sum the same numbers in different orders. This bounds the difference of their float32 weights.
# Gradients are at most 4 here, so such a sum is wrong by at most δ = 4 · 2^-22, about 1e-6. The error moves a weight by
# at most 2 · learning rate · δ / ε in each step (see process_runs.ADAM_EPSILON). The learning rates of a run add up to
# 1e-3: 2e-6 in all, doubled as a margin. (In stage 2 they add up to 1e-2, but gradients are at most 0.2.) Measured:
# 2.7e-7. The faults that the tests look for leave 1e-4 or more: gradients that are summed or not averaged, other
# images, noise from the seeds of another process; an adaptive weight that is not averaged leaves 3e-4 in "stage1".
ROUNDING = 4e-6
# 50 steps of SGD. Momentum 0.9 raises the learning rate of 0.1 to 1. Gradients are at most 0.7, wrong by at most 8e-8.
# That is 4e-6 in all, doubled as a margin. Measured: 6e-7. A restart or a gradient of one process alone leaves 0.03 or
# more.
ROUNDING_OF_CODEBOOKS = 8e-6
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"


def launch(module: str, *arguments: object, path: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a module on two processes of this machine's CPU."""
    settings = {**ON_CPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    environment = {**os.environ, **settings}
    command = [sys.executable, *LAUNCH.split(), "--dynamo_backend", "no", "--main_process_port", "0", "-m", module]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    process_runs.run_all(folder, folder)
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    forks.run_on_two_processes(process_runs.run_all_on_two, folder, one, log=folder / "log.txt")
    return folder


def state(folder, name, process):
    return torch.load(folder / "states" / f"{name}-{process}.pt", weights_only=True)


@pytest.mark.parametrize("name", ["stage1", "stage2", "masked", *process_runs.WHOLE, *process_runs.NETWORKS])
def test_every_process_holds_the_same(two, name):
    first, second = (tensors(state(two, name, process)) for process in range(2))
    assert first.keys() == second.keys() and len(first) > 20
    assert [path for path in first if not torch.equal(first[path], second[path])] == []


def test_without_the_wrapper_they_would_not(two):
    first, second = (tensors(state(two, "bypassed", process)) for process in range(2))
    assert [path for path in first if not torch.equal(first[path], second[path])] != []


@pytest.mark.parametrize("name, options", [(name, options) for name, _, _, options in process_runs.QUANTIZERS])
def test_codebooks_are_those_of_one_process(one, two, name, options):
    """Compares the quantizers after 50 updates on fixed latents, with k-means and restarts."""
    run = f"quantizer {name} {'-'.join(options)}"
    single, first, second = state(one, run, 0), state(two, run, 0), state(two, run, 1)
    assert single.keys() == first.keys() == second.keys()
    for part, value in single.items():
        assert part == "restarted" or torch.equal(first[part], second[part])
        torch.testing.assert_close(first[part], value, atol=ROUNDING_OF_CODEBOOKS, rtol=0)
    assert (single["restarted"] > 0) == (name in {"vq", "ema", "gumbel", "residual", "product", "pyramid"})


@pytest.mark.parametrize("name", ["stage1", "stage2", "masked", *process_runs.WHOLE, *process_runs.NETWORKS])
def test_two_processes_are_one_with_twice_the_batch(one, two, name):
    single, double = (tensors(state(folder, name, 0)) for folder in (one, two))
    assert single.keys() == double.keys()
    differences = {path: difference(single[path], double[path]) for path in single}
    assert max(differences.values()) <= ROUNDING, worst(differences)
    if name == "stage1":
        assert single["/restarted"] > 0  # codes did restart


def difference(a, b):
    """The largest difference, relative to values above 1, because ActNorm's scales are in the hundreds."""
    return ((a.double() - b.double()).abs() / a.double().abs().clamp(min=1)).max().item()


def worst(differences):
    return sorted(differences.items(), key=lambda pair: -pair[1])[:5]


def test_the_codes_are_the_same_files(one, two):
    """Two processes share the encoding with one tokenizer, and write the same store as one process."""
    stores = one / "codes", two / "codes"
    names = [sorted(path.name for path in store.glob("*.arrow")) for store in stores]
    assert names[0] == names[1] == ["train-00000.arrow", "validation-00000.arrow"]
    for name in names[0]:
        assert (stores[0] / name).read_bytes() == (stores[1] / name).read_bytes()
    assert len(CodeStore(stores[1]).split("train")) == 1437


def logs(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["prior", "masked"])
def test_the_evaluation_of_stage_2_counts_each_code_once(one, two, name):
    """360 rows are no multiple of the batch size 100. Both processes have other numbers of hidden codes."""
    losses = [[line["eval_loss"] for line in logs(folder / name) if "eval_loss" in line] for folder in (one, two)]
    assert len(losses[0]) == 1 and losses[1] == pytest.approx(losses[0], rel=2e-6)


def test_stage_2_draws_one_grid_and_counts_the_tokens_of_all(one, two):
    grids = [sorted((folder / "prior" / "samples").iterdir()) for folder in (one, two)]
    assert [[path.name for path in paths] for paths in grids] == [["step_00000010.png"]] * 2
    for folder in (one, two):
        speeds = [line for line in logs(folder / "prior") if "loss" in line]
        assert [line["step"] for line in speeds] == [5, 10]
        assert all(line["tokens_per_second"] > 0 and line["mfu"] > 0 for line in speeds)


def test_metrics_are_global(one, two):
    lines = [logs(folder / "vqgan") for folder in (one, two)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [5, 10, 10]
    for single, double in zip(*lines, strict=True):
        for key in set(single) - {"images_per_second"}:
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), key
    assert lines[1][-1]["eval/images"] == 360


def test_a_tokenizer_has_the_same_figures(one, two):
    """Each image counts once, whichever process has it. Sums of features differ by the order of float32 numbers."""
    single, double = (json.loads((folder / "measured" / "metrics.json").read_text()) for folder in (one, two))
    assert single["images"] == 1437 and single.pop("setup") == double.pop("setup")
    assert single.pop("left_out") == double.pop("left_out") and single["frechet_distance/small"] > 0
    assert double == pytest.approx(single, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", process_runs.FURTHER)
def test_further_quantizers_are_the_same_on_two_processes(name, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    process_runs.run_whole(one, name)
    GradientState._reset_state()
    forks.run_on_two_processes(process_runs.run_whole, two, name, log=tmp_path / "log.txt")
    test_every_process_holds_the_same(two, name)
    test_two_processes_are_one_with_twice_the_batch(one, two, name)


@pytest.mark.slow
def test_every_game_is_the_same_on_two_processes(tmp_path):
    (tmp_path / "games.py").write_text(
        "import sys, pathlib; from tests import process_runs; process_runs.run_games(pathlib.Path(sys.argv[1]))"
    )
    process_runs.run_games(tmp_path / "one")
    GradientState._reset_state()
    done = launch("games", tmp_path / "two", path=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    names = sorted(path.name.removesuffix("-0.pt") for path in (tmp_path / "one" / "states").iterdir())
    assert len(names) == len(process_runs.GAMES)
    for name in names:
        single, double, other = (
            tensors(state(tmp_path / folder, name, process)) for folder, process in (("one", 0), ("two", 0), ("two", 1))
        )
        assert all(torch.equal(double[path], other[path]) for path in double), name
        differences = {path: difference(single[path], double[path]) for path in single}
        assert max(differences.values()) <= 1e-5, (name, worst(differences))


DYING = """
import sys
from pathlib import Path
from tests import process_runs
from stage1_vqgan.training.step import VQGANTrainer
step = VQGANTrainer.step
def die(self, images, number):
    if number == 3 and self.accelerator.process_index == 1:
        raise RuntimeError("this process cannot go on")
    return step(self, images, number)
VQGANTrainer.step = die
process_runs.run_stage1(process_runs.stage1_config(Path(sys.argv[1]), max_steps=10**6), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job(tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    started = time.monotonic()
    done = launch("dying", tmp_path, path=tmp_path)
    assert done.returncode != 0 and "this process cannot go on" in done.stderr
    assert time.monotonic() - started < 200  # on a busy machine; the other process would train for days
