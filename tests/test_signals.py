"""SIGTERM and Ctrl-C: the run saves after the step, exits with the documented code, and the same command resumes."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs import command_line
from configs.checkpoints import complete_checkpoints
from configs.interruption import Stopped, StopRequest, leave_signals_to_main, sigterm_raises
from tests import forks, kill_runs
from tests.slow import few

ROOT = Path(__file__).parents[1]
POINTS = {"stage1": ("step", 9), "stage2": ("step", 7), "tokenize": ("shard", 3)}


@pytest.mark.parametrize(
    ("name", "number", "exit_code"),
    [
        ("stage1", signal.SIGINT, 130),
        ("stage2", signal.SIGTERM, 143),
        ("tokenize", signal.SIGINT, 130),
        pytest.param("stage1", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("stage2", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("tokenize", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_command_that_is_stopped_goes_on(name, number, exit_code, undisturbed, tmp_path):
    kill_runs.prepare(name, undisturbed, tmp_path)
    pause = 10 if name == "tokenize" else 0.5  # a signal ends the pause of tokenize
    assert kill_runs.interrupt(name, tmp_path, [(number, 0)], *POINTS[name], pause=pause) == exit_code
    log = (tmp_path / "log.txt").read_text()
    assert re.search("the same command resumes from", log) and "Traceback" not in log, log
    if name == "tokenize":
        assert not (tmp_path / "codes" / "manifest.json").exists()
    else:
        newest = complete_checkpoints(tmp_path / kill_runs.FOLDERS[name])[-1]
        assert f"stopped after step {newest.step} of" in log and 4 <= newest.step <= 8
    assert kill_runs.run(name, tmp_path) == 0
    assert kill_runs.differences(name, undisturbed, tmp_path) == []


# A module that a command imports. It waits for the signal, and swallows what Ctrl-C raises, as some libraries do.
SLOW_MODULE = """
import time
print("importing", flush=True)
try:
    time.sleep(100)
except BaseException:
    pass
"""


@pytest.mark.parametrize(
    ("command", "imported"),  # torch after the arguments are read, psutil before
    few(
        itertools.product(["stage1_vqgan.train", "tessella train-tokenizer"], ["torch", "psutil"]),
        ("stage1_vqgan.train", "psutil"),
        ("tessella train-tokenizer", "torch"),
    ),
)
def test_ctrl_c_while_modules_are_imported_is_one_line(command, imported, tmp_path):
    (tmp_path / f"{imported}.py").write_text(SLOW_MODULE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    words = [sys.executable, "-m", *command.split(), "digits/stage1", "--output_dir", str(tmp_path / "run")]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        for _ in range(2):  # a launcher forwards the signal that the terminal has already sent
            os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate()
    assert (process.returncode, output) == (130, "")
    assert errors == "\nstopped at once; the same command resumes from what was saved\n"


# A command whose KeyboardInterrupt is ignored, as Python does it in a destructor.
LOST = """
import os, signal, time
from configs import ctrl_c

class Owner:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

ctrl_c.LOST_AFTER_SECONDS = 0.5
ctrl_c.ctrl_c.install()
owner = Owner()
del owner
print("goes on", flush=True)
time.sleep(10)
"""


def test_a_ctrl_c_that_a_destructor_swallows_is_not_lost():
    done = subprocess.run([sys.executable, "-c", LOST], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "goes on\n") and "Exception ignored in" in done.stderr
    assert done.stderr.endswith("\nstopped at once; the same command resumes from what was saved\n")


def test_an_error_that_a_library_makes_of_ctrl_c_is_one_line(capsys):
    def main(config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            command_line.run(kill_runs.Nothing, main, "command", [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130 and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert capsys.readouterr().err == "\nstopped at once; the same command resumes from what was saved\n"


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    signals = [(signal.SIGINT, 0), (signal.SIGINT, 1.5)]  # two signals within a second count as one
    started = time.monotonic()
    assert kill_runs.interrupt("stage1", tmp_path, signals, "step", 9, pause=120) == 130
    assert time.monotonic() - started < 100  # a run takes 3 seconds, or 30 on a busy machine
    log = (tmp_path / "log.txt").read_text()
    assert "stopped at once" in log and "Traceback" not in log  # for what it leaves, see tests/test_kills.py


def orphan(folder):
    """A data loader worker whose run dies while the worker starts."""
    (folder / "pid").write_text(str(os.getpid()))
    while multiprocessing.parent_process().pid == os.getppid():
        time.sleep(0.01)
    leave_signals_to_main(0)
    (folder / "stayed").touch()


def killed_run(folder):
    multiprocessing.get_context("fork").Process(target=orphan, args=(folder,)).start()
    while not (folder / "pid").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_does_not_outlive_a_run_that_was_killed_while_it_started(tmp_path):
    """torch watches for the death of the parent only after `worker_init_fn`."""
    run = forks.CONTEXT.Process(target=killed_run, args=(tmp_path,))
    run.start()
    run.join(60)  # waits for the worker too, which has the other end of the pipe
    assert run.exitcode == -signal.SIGKILL
    assert (tmp_path / "pid").exists() and not (tmp_path / "stayed").exists()


def test_two_signals_within_a_second_are_one_request():
    """A launcher forwards the Ctrl-C that the terminal has already sent to the worker."""
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.agreed_signal() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        request._since -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.agreed_signal() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with sigterm_raises(), StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigterm_outside_a_loop_is_an_exception():
    with pytest.raises(Stopped) as stopped, sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert stopped.value.exit_code == 143


def test_in_another_thread_nothing_is_caught():
    found = []

    def use():
        with sigterm_raises(), StopRequest() as request:
            found.append(request.agreed_signal())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [None]


SERVED = """
import multiprocessing, os, sys, time
from configs.interruption import leave_signals_to_main

def work():
    leave_signals_to_main(0)
    print(os.getpid(), flush=True)
    time.sleep(10**6)

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    multiprocessing.Process(target=work, daemon=True).start()
    time.sleep(10**6)
"""


def test_a_worker_of_a_server_process_does_not_outlive_a_run_that_was_killed(tmp_path):
    """torch watches only the server, which lives as long as its workers."""
    (tmp_path / "run.py").write_text(SERVED)
    command, environment = [sys.executable, str(tmp_path / "run.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        run.kill()
        run.communicate(timeout=120)  # the output ends when the worker and the server have ended
    assert not Path(f"/proc/{worker}").exists() or "zombie" in Path(f"/proc/{worker}/status").read_text()
