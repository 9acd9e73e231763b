"""A rank that is killed or stalls: the launcher starts all ranks again, and the run ends as an undisturbed one.

Two machines train as one does.
"""

import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate import PartialState

from configs import ConfigError, groups
from configs.stalls import watched_for_stalls
from tests import elastic_runs, forks, kill_runs
from tests.devices import cpu_only

pytestmark = cpu_only
CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


def torchrun(name: str, folder: Path, *faults: str, restarts: int = 3) -> subprocess.CompletedProcess[str]:
    """Runs on two ranks. Each of the faults happens once, in any attempt."""
    options = ["--nproc_per_node", "2", "--max_restarts", str(restarts), "--master_port", str(elastic_runs.free_port())]
    module = ["-m", "tests.elastic_runs", name, str(folder), *faults]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *module]
    return subprocess.run(command, env=elastic_runs.ENVIRONMENT, capture_output=True, text=True, timeout=1200)


def stall(late: int) -> None:
    """Waits for a rank that sleeps."""
    processes = PartialState(cpu=True)
    processes.wait_for_everyone()
    with watched_for_stalls(seconds=3):
        if processes.process_index == late:
            time.sleep(10**6)
        processes.wait_for_everyone()


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_waits_too_long_ends_and_names_the_late_one(late, tmp_path):
    process = forks.start(forks.launch_two, (stall, (late,), {}), tmp_path / "log.txt")
    assert forks.end(process, tmp_path / "log.txt") == 1
    log = (tmp_path / "log.txt").read_text()
    where = r"last seen in stall \(tests/test_elastic.py:\d+\)"
    assert re.search(rf"^stalled: rank {late}, {where}; the other processes have waited for 3 seconds", log, re.M), log
    assert f"process {1 - late} terminated with exit code 6" in log, log


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    """As under torchrun on a machine without a GPU, where accelerate connects nothing unless it is told to use CPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = r"ACCELERATE_USE_CPU: the launcher started 2 processes.*groups of 1"
    with pytest.raises(ConfigError, match=message), watched_for_stalls(seconds=5):
        pytest.fail("it must not train")


@pytest.mark.parametrize("fixed, method", [((3, 11), "fork"), ((99,), "forkserver")])
def test_workers_of_a_group_are_forked_elsewhere_where_a_fork_may_hang(monkeypatch, fixed, method):
    preloaded = []
    monkeypatch.setattr(groups, "FORKS_SAFELY", fixed)
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", preloaded.extend)  # tests.forks has its own
    before = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("fork", force=True)
        groups.fork_workers_elsewhere()
        assert multiprocessing.get_start_method() == method
        assert preloaded == (groups.WORKERS_RUN if method == "forkserver" else [])
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Both stages on two ranks, without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("stage1", "tokenize", "stage2"):
        done = torchrun(name, folder, restarts=0)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


FAULTS = {
    "stage1": ["1:kill:step:11", "0:kill:write:7", "0:kill:step:9"],
    "tokenize": ["1:kill:shard:1", "0:kill:shard:2", "0:kill:write:1"],
    "stage2": ["0:kill:save:3", "1:kill:step:7", "1:kill:start:1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_torchrun_ends_a_run_of_which_ranks_are_killed(name, two_ranks, tmp_path):
    kill_runs.prepare(name, two_ranks, tmp_path)
    done = torchrun(name, tmp_path, *FAULTS[name])
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum("kill at" in line for line in done.stderr.splitlines()) == len(FAULTS[name]), done.stderr[-4000:]
    assert kill_runs.differences(name, two_ranks, tmp_path) == []


def accelerate_launch(folder: Path, *options: str, faults: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Starts stage 1 on two ranks."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *options]
    module = ["-m", "tests.elastic_runs", "stage1", str(folder), *faults]
    return subprocess.Popen([*launch, *module], env=elastic_runs.ENVIRONMENT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_accelerate_starts_killed_ranks_again(two_ranks, tmp_path):
    options = ["--config_file", str(CONFIGS / "multi_gpu.yaml"), "--max_restarts", "1"]
    launched = accelerate_launch(
        tmp_path, *options, "--main_process_port", str(elastic_runs.free_port()), faults=["0:kill:step:13"]
    )
    _, log = launched.communicate(timeout=1200)
    assert launched.returncode == 0 and "kill at" in log, log[-4000:]
    assert kill_runs.differences("stage1", two_ranks, tmp_path) == []


@pytest.mark.slow
def test_two_machines_train_as_one(two_ranks, tmp_path):
    """Two launchers on this machine, with one rank each."""
    options = ["--config_file", str(CONFIGS / "multi_node.yaml"), "--main_process_port", str(elastic_runs.free_port())]
    machines = [accelerate_launch(tmp_path, *options, "--machine_rank", rank) for rank in "01"]
    logs = [machine.communicate(timeout=1200)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], logs
    assert kill_runs.differences("stage1", two_ranks, tmp_path) == []


def places_of_stall(done: subprocess.CompletedProcess[str], rank: str) -> tuple[str, ...]:
    """Where the late rank was and where the others waited, from the message."""
    place = r"in (\w+ \((?:configs|stage1_vqgan|stage2_prior)/[\w/]+\.py:\d+\))"
    message = rf"^stalled: rank {rank}, last seen {place}; .* \(ddp_timeout\) {place}\. The same command resumes"
    (places,) = re.findall(message, done.stderr, re.M) or [done.stderr[-4000:]]
    assert len(places) == 2, places
    return places


@pytest.mark.slow
@pytest.mark.parametrize("name, fault", [("stage1", "1:stop:step:11"), ("stage2", "0:sleep:step:9")])
def test_a_rank_that_stalls_is_named_and_the_run_goes_on(name, fault, two_ranks, tmp_path):
    kill_runs.prepare(name, two_ranks, tmp_path)
    stalled = torchrun(name, tmp_path, fault, restarts=0)
    assert stalled.returncode == 1
    rank = fault[0]
    assert places_of_stall(stalled, rank)
    assert "exitcode  : 6" in stalled.stderr
    again = torchrun(name, tmp_path)
    assert again.returncode == 0, again.stderr[-4000:]
    assert kill_runs.differences(name, two_ranks, tmp_path) == []


@pytest.mark.slow
def test_tokenize_names_a_rank_that_stalls(two_ranks, tmp_path):
    kill_runs.prepare("tokenize", two_ranks, tmp_path)
    stalled = torchrun("tokenize", tmp_path, "1:stop:shard:1", restarts=1)
    assert places_of_stall(stalled, "1")  # it stopped early: the first report comes at once
    assert stalled.returncode == 0, stalled.stderr[-4000:]  # the second attempt
    assert kill_runs.differences("tokenize", two_ranks, tmp_path) == []
