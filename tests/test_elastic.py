"""A rank that is killed or stalls: torchrun starts all ranks again, and the run ends as an undisturbed one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import elastic_runs, kill_runs
from tests.devices import cpu_only

pytestmark = cpu_only


def torchrun(name: str, folder: Path, *faults: str, restarts: int = 3) -> subprocess.CompletedProcess[str]:
    """Runs on two ranks. Each of the faults happens once, in any attempt."""
    options = ["--nproc_per_node", "2", "--max_restarts", str(restarts), "--master_port", str(elastic_runs.free_port())]
    module = ["-m", "tests.elastic_runs", name, str(folder), *faults]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *module]
    return subprocess.run(command, env=elastic_runs.ENVIRONMENT, capture_output=True, text=True, timeout=300)


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


@pytest.mark.slow
@pytest.mark.parametrize("name, fault", [("stage1", "1:stop:step:11"), ("stage2", "0:sleep:step:9")])
def test_a_rank_that_stalls_is_named_and_the_run_goes_on(name, fault, two_ranks, tmp_path):
    kill_runs.prepare(name, two_ranks, tmp_path)
    stalled = torchrun(name, tmp_path, fault, restarts=0)
    assert stalled.returncode == 1
    rank = fault[0]
    (message,) = [line for line in stalled.stderr.splitlines() if line.startswith("stalled: ")]
    assert message.startswith(f"stalled: rank {rank}, last seen in ") and "The same command resumes" in message
    assert "exitcode  : 4" in stalled.stderr
    again = torchrun(name, tmp_path)
    assert again.returncode == 0, again.stderr[-4000:]
    assert kill_runs.differences(name, two_ranks, tmp_path) == []


@pytest.mark.slow
def test_tokenize_names_a_rank_that_stalls(two_ranks, tmp_path):
    kill_runs.prepare("tokenize", two_ranks, tmp_path)
    stalled = torchrun("tokenize", tmp_path, "1:stop:shard:1", restarts=1)
    assert "stalled: rank 1, last seen in" in stalled.stderr
    assert stalled.returncode == 0, stalled.stderr[-4000:]  # the second attempt
    assert kill_runs.differences("tokenize", two_ranks, tmp_path) == []
