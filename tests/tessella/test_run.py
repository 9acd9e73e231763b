"""`tessella run`: its settings, the commands of its steps, and which of them it skips."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs import ConfigError, check, load_config, parse_arguments
from stage2_prior import TokenLayout
from tessella import run, steps
from tessella.config import RunConfig
from tessella.processes import Child
from tessella.run import Progress
from tessella.steps import Step, training_steps
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[2]


def config(**changes: Any) -> RunConfig:
    values = {"data": "digits", "output_dir": "out", "stage1": "digits/stage1", "stage2": "digits/stage2"}
    return check(RunConfig(**{**values, **changes}))


@pytest.mark.parametrize(
    ("budget", "minutes", "count"),
    [
        ("30 minutes", 30, None),
        ("1.5h", 90, None),
        ("2 hours", 120, None),
        ("5min", 5, None),
        ("2000 steps", None, 2000),
    ],
)
def test_budgets(budget, minutes, count):
    assert (config(budget=budget).minutes, config(budget=budget).steps) == (minutes, count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "soon"}, "budget: received 'soon'; must be such as '30 minutes', '2 hours' or '2000 steps'"),
        ({"budget": "0 steps"}, "budget: received '0 steps'"),
        ({"data": {"dataset": "digits", "labels": "x"}}, "data.labels: unknown key"),
        ({"data": {"train_split": "a"}}, "data.dataset: is required"),
        ({"size": 0}, "size: received 0; must be a whole number"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("size", "gpus", "folder"),
    [
        (None, 0, "cpu"),
        (128, 0, "cpu"),
        (None, 1, "64"),
        (32, 1, "64"),
        (96, 1, "128"),
        (128, 8, "128"),
        (192, 1, "256"),
    ],
)
def test_the_preset_fits_device_and_size(size, gpus, folder):
    chosen = steps.presets(config(size=size, stage1=None, stage2=None), gpus)
    assert chosen == (f"own/{folder}/stage1", f"own/{folder}/stage2")


def test_the_commands_are_those_of_the_command_line():
    made = training_steps(config(size=32, channels=3, classes=False, data={"dataset": "a b", "label_column": "c"}), 1)
    data = "--data.dataset 'a b' --data.label_column c --data.use_labels false"
    prior = f"digits/stage2 {data} --tokenizer out/vqgan --code_store out/codes --output_dir out/prior"
    assert [step.command(1) for step in made] == [
        f"tessella train-tokenizer digits/stage1 {data} --output_dir out/vqgan "
        "--model.image_size 32 --model.in_channels 3",
        f"tessella tokenize {prior}",
        f"tessella train-prior {prior}",
    ]
    assert made[0].command(8).startswith("accelerate launch --multi_gpu --num_machines 1")
    assert "--num_processes 8 -m tessella train-tokenizer digits/stage1" in made[0].command(8)
    push = "tessella push --folder out/pipeline --hub_model_id me/model"
    assert steps.push_step(config(push="me/model")).command(0) == push
    assert steps.push_step(config(push="me/model", license="mit")).command(0) == f"{push} --license mit"


@pytest.mark.parametrize(
    ("names", "has_null", "guided"), [(("a", "b"), True, True), (("a", "b"), False, False), ((), True, False)]
)
def test_a_pipeline_with_classes_has_guidance_by_default(tmp_path, names, has_null, guided):
    (tmp_path / "prior").mkdir()
    TokenLayout(8, names, (2, 2), 4, "f" * 64, has_null=has_null).save_pretrained(tmp_path / "prior")
    command = steps.building_step(config(output_dir=str(tmp_path))).command(8)
    assert command.startswith(f"tessella build --tokenizer {tmp_path}/vqgan")
    assert ("--sampling_defaults '{guidance_scale: 1.5}'" in command) == guided


def test_mistakes_of_all_steps_are_told_before_the_first():
    with pytest.raises(ConfigError) as caught:
        steps.check(training_steps(config(size=18, stage2="digits/stag2"), 0))
    assert "size: received 18; must be divisible by the downsampling factor" in str(caught.value)
    assert "did you mean the preset 'digits/stage2'?" in str(caught.value)


def test_a_push_that_would_fail_is_told_under_the_name_of_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        run.main(config(push="me/model", output_dir=str(tmp_path / "out")))
    assert [problem.key for problem in caught.value.problems] == ["push"]


def test_values_are_written_so_that_the_command_line_reads_them():
    values = {"a": None, "b": True, "c": 1e-4, "d": "1e-4", "e": ["x", 2], "f": "no: yes", "g": "ü"}
    words = Step("x", None, values, Path()).arguments
    assert parse_arguments(words) == (None, values, [])


def test_the_exit_code_of_a_step_is_passed_on(tmp_path, capfd):
    child = Child(Step("no-such-command", None, {}, tmp_path), 0)
    with child.running() as process:
        assert child.exit_code(process) == 2
    assert "there is no command 'no-such-command'" in capfd.readouterr().err


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run whose steps write their result instead of training.

    `ran` lists them; `codes` are their exit codes, and `signals` what comes to this process in the meantime.
    """
    ran: list[str] = []
    codes: dict[str, int] = {}
    signals: dict[str, int] = {}

    class Worker:
        def __init__(self, step: Step, gpus: int):
            self.step, self.stopped_by = step, signals.get(step.name)

        def running(self) -> Any:
            return self

        def __enter__(self) -> None:
            ran.append(self.step.name)

        def __exit__(self, *exception: Any) -> None:
            pass

        def exit_code(self, process: None) -> int:
            if self.step.name not in codes:
                self.step.result.parent.mkdir(parents=True, exist_ok=True)
                self.step.result.touch()
            return codes.get(self.step.name, 0)

    monkeypatch.setattr(run, "Child", Worker)
    monkeypatch.setattr(run, "number_of_gpus", lambda: 0)
    monkeypatch.setattr(run, "check", lambda steps: None)
    monkeypatch.setattr(run, "seconds_per_step", lambda step, folder, gpus: 0.5)
    monkeypatch.setattr(
        run, "evaluation_step", lambda config, gpus: Step("evaluate", None, {}, tmp_path / "metrics.json")
    )
    monkeypatch.setattr(
        run, "building_step", lambda config: Step("build", None, {}, tmp_path / "pipeline" / "model_index.json")
    )

    def start(**changes: Any) -> list[str]:
        ran.clear()
        run.main(config(output_dir=str(tmp_path), **changes))
        return list(ran)

    return SimpleNamespace(start=start, ran=ran, codes=codes, signals=signals, folder=tmp_path)


ALL = ["train-tokenizer", "tokenize", "train-prior", "build", "evaluate"]


def test_a_finished_step_is_skipped(world, capsys):
    assert world.start() == ALL
    assert world.start() == []
    said = capsys.readouterr().out
    assert "[1/5] train-tokenizer: done before" in said
    assert f"tessella generate {world.folder / 'pipeline'} --num_images 16" in said
    (world.folder / "prior" / "train_results.json").unlink()  # then all that follows runs again
    assert world.start() == ["train-prior", "build", "evaluate"]
    assert world.start(size=32) == ALL


def test_the_hub_is_asked_before_the_first_step(world, monkeypatch):
    with HubServer() as hub:
        hub.use(monkeypatch)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        with pytest.raises(ConfigError, match="received 'you/model'; an upload would fail: your token must not write"):
            world.start(push="you/model")
        assert world.ran == []
        assert world.start() == ALL
        assert world.start(push="me/model") == ["push"]


def test_a_step_that_fails_ends_the_run_with_its_code_and_goes_on_later(world, capsys):
    world.codes["tokenize"] = 4
    with pytest.raises(SystemExit) as caught:
        world.start()
    assert caught.value.code == 4 and world.ran == ["train-tokenizer", "tokenize"]
    assert "[2/5] tokenize ended with exit code 4" in capsys.readouterr().err
    world.codes.clear()
    assert world.start() == ALL[1:]


def test_a_folder_that_cannot_be_made_is_told_before_the_first_step(world):
    (world.folder / "file").touch()
    with pytest.raises(FileExistsError):  # a command makes a message of it
        run.main(config(output_dir=str(world.folder / "file")))
    assert world.ran == []


def test_a_step_that_was_stopped_adds_no_line(world, capsys):
    world.codes["tokenize"] = 130
    with pytest.raises(SystemExit) as caught:
        world.start()
    assert caught.value.code == 130 and capsys.readouterr().err == ""


def test_a_signal_that_comes_when_a_step_has_all_but_finished_ends_the_run(world, capsys):
    world.signals["tokenize"] = signal.SIGINT
    with pytest.raises(SystemExit) as caught:
        world.start()
    assert caught.value.code == 130 and world.ran == ["train-tokenizer", "tokenize"]
    assert capsys.readouterr().err == "\nstopped after [2/5] tokenize; the same command goes on from there\n"
    world.signals.clear()
    assert world.start() == ALL[2:]


FINISHES = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(0.5)"


def test_a_child_that_finishes_in_spite_of_a_signal_remembers_it(tmp_path):
    with open(tmp_path / "output.txt", "w+") as output:
        child = Child(Step("train-tokenizer", None, {}, tmp_path), 0, output)
        child._command = [sys.executable, "-c", FINISHES]
        with child.running() as process:
            while not (tmp_path / "output.txt").read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            assert child.exit_code(process) == 0
    assert child.stopped_by == signal.SIGINT


def test_a_budget_in_minutes_becomes_steps_once(world, capsys, monkeypatch):
    world.start(budget="10 minutes")
    lines = capsys.readouterr().out.splitlines()
    assert "      a step takes 0.50 s: 540 steps in 4.5 minutes" in lines  # 45 % of 10 minutes
    assert "      a step takes 0.50 s: 1,080 steps in 9.0 minutes" in lines  # the first took no time here
    assert any(line.endswith("--max_steps 540") for line in lines)
    monkeypatch.setattr(run, "seconds_per_step", lambda *arguments: 1 / 0)
    assert world.start(budget="10 minutes") == []


def test_a_budget_in_minutes_that_is_too_short_is_refused(world):
    with pytest.raises(ConfigError, match=r"received '0.1 minutes'; leaves 5 steps to train-tokenizer; give more time"):
        world.start(budget="0.1 minutes")


def test_steps_that_took_too_long_leave_the_prior_a_share(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "seconds_per_step", lambda step, folder, gpus: 0.5)
    progress = Progress(config(output_dir=str(tmp_path), budget="10 minutes"), 0, 5)
    progress.values["seconds"] = {"train-tokenizer": 3600}
    step = Step("train-prior", None, {}, tmp_path)
    progress.within_budget(step, "")
    assert step.keys["max_steps"] == 240 and "240 steps in 2.0 minutes" in capsys.readouterr().out


def test_a_file_of_settings_is_enough(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: path/to/images\noutput_dir: runs/mine\nsize: 64\nclasses: false\nbudget: 30 minutes\n")
    loaded = load_config(RunConfig, str(path))
    assert loaded.data_keys == {"dataset": "path/to/images", "use_labels": False} and loaded.minutes == 30


def test_the_classes_of_an_evaluation_are_few_enough(monkeypatch):
    """Each class has some images, and all together not too many; one class alone has no classifier."""
    counts = {}
    for classes in (0, 1, 2, 10, 1000):
        names = [str(number) for number in range(classes)]
        manifest = {"token_layout": {"class_names": names}, "splits": {"train": {"images": 20}}}
        monkeypatch.setattr("stage2_prior.manifest.read_manifest", lambda path, manifest=manifest: manifest)
        step = steps.evaluation_step(config(), 0)
        counts[classes] = step.keys["samples_per_class"]
        assert step.keys["num_components"] == 20
        assert ("data.use_labels" in step.keys) == (classes == 1)
    assert counts == {0: 200, 1: 50, 2: 50, 10: 20, 1000: 4}


TWO_PROCESSES = """
import sys
from pathlib import Path
from tessella.processes import Child
from tessella.steps import Step

if __name__ == "__main__":
    keys = {"output_dir": sys.argv[1], "max_steps": 100_000, "report_to": []}
    child = Child(Step("train-tokenizer", "digits/stage1", keys, Path(), launched=True), gpus=2)
    with child.running() as process:
        sys.exit(child.exit_code(process))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_several_processes_are_stopped_in_one_line(number, tmp_path):
    """`accelerate launch` alone would print tracebacks of its own."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    with open(tmp_path / "log.txt", "w") as log:
        words = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "run")]
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    while "3/100000" not in (tmp_path / "log.txt").read_text():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.1)
    os.kill(process.pid, number)
    assert process.wait() == 128 + number
    last = (tmp_path / "log.txt").read_text().rpartition("stage 1:")[2]
    assert re.search(
        r"\nstopped after step \d+ of 100000, which is saved in .*; the same command resumes from there\n$", last
    )
    assert last.count("stopped after") == 1 and "Traceback" not in last
