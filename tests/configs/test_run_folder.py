"""The folder of a run: the same settings resume, other settings are refused, a finished run stays finished."""

import json
import logging
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, Section, load_config, run_folder
from configs.checkpoints import unfinished_path
from configs.folder_lock import OWNER_NAME
from configs.resumed_settings import FREE_KEYS
from configs.run_folder import CONFIG_NAME, LOG_NAME, RunFolder


@dataclass(kw_only=True)
class Part(Section):
    rotate: float = 1.0
    save_steps: int = 1


@dataclass(kw_only=True)
class Data(Section):
    max_skipped_fraction: float = 0.01


@dataclass(kw_only=True)
class Run(Section):
    output_dir: str
    max_steps: int = 20
    learning_rate: float = 1e-5
    save_steps: int = 10
    save_total_limit: int = 2
    resume_from_checkpoint: str = "latest"
    allow_config_changes: bool = False
    report_to: list[str] = field(default_factory=list)
    push_to_hub: bool = False
    hub_model_id: str | None = None
    part: Part = field(default_factory=Part)
    data: Data = field(default_factory=Data)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Stage1Like(Run):
    discriminator: Part = field(default_factory=Part)
    codebook: int = 3


@dataclass(kw_only=True)
class Stage2Like(Run):
    code_store: str = "x"


@pytest.fixture
def config(tmp_path):
    return Run(output_dir=str(tmp_path / "a" / "run"), model={"widths": [1, 2], "cost": 0.25})


def opened(config, **kwargs):
    """The results that a run finds when it opens its folder."""
    with RunFolder(config, **kwargs) as run:
        if run.results is None:
            run.begin(1)
        return run.results


def checkpoint(run, step, num_processes=1):
    unfinished_path(run.path, step).mkdir(parents=True)
    run.publish(step, num_processes)


def start(config):
    """A run that was interrupted after a checkpoint."""
    with RunFolder(config) as run:
        run.begin(1)
        for step in (5, 10, 15):
            run.log(step, {"loss": 1 / step})
        checkpoint(run, 10)


def test_new_folder_gets_the_resolved_configuration(config):
    assert opened(config) is None
    assert load_config(Run, f"{config.output_dir}/{CONFIG_NAME}") == config


def test_other_processes_than_the_main_one_write_nothing(config, tmp_path):
    assert opened(config, is_main_process=False) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_work_starts_anew(config):
    opened(config)
    changed = replace(config, learning_rate=0.1)
    assert opened(changed) is None
    assert load_config(Run, f"{config.output_dir}/{CONFIG_NAME}") == changed


def test_a_run_resumes_and_finishes(config):
    opened(config)
    assert opened(config) is None
    with RunFolder(config) as run:
        run.finish(20, {"psnr": 20.5})
    results = opened(config)
    measured = {name: results[name] for name in ("train_runtime", "hardware")}
    assert results == {"global_step": 20, **measured, "psnr": 20.5}
    assert opened(config, is_main_process=False) == results


def test_the_main_process_reports_a_finished_run_and_uploads_it(config, monkeypatch, capsys):
    uploads = []
    monkeypatch.setattr(
        run_folder, "push_run", lambda config, export: uploads.append(config.hub_model_id) or "hub/me/run"
    )
    pushed = replace(config, push_to_hub=True, hub_model_id="me/run")
    with RunFolder(config) as run:
        assert not run.report_if_finished()
        run.begin(1)
        run.finish(20, {})
    assert capsys.readouterr().out == "" and not uploads
    for is_main_process in (True, False):
        with RunFolder(pushed, is_main_process) as run:
            assert run.report_if_finished()
    expected = [f"{config.output_dir} holds the finished run (20 steps); nothing to do", "uploaded to hub/me/run"]
    assert capsys.readouterr().out.splitlines() == expected and uploads == ["me/run"]
    with RunFolder(pushed) as run:
        run.finish(20, {})
    assert uploads == ["me/run"] * 2


def test_a_run_that_diverged_names_its_last_good_checkpoint(config, tmp_path):
    with RunFolder(config) as run:
        assert "the loss was nan; no checkpoint was saved yet. Try a lower" in str(run.diverged("the loss was nan"))
    start(config)
    first = f"{config.output_dir}/checkpoint-10"
    branch = replace(config, output_dir=str(tmp_path / "branch"), resume_from_checkpoint=first)
    with RunFolder(branch) as run:
        run.begin(1)
        assert f"the last good checkpoint is {first}." in str(run.diverged(""))
        checkpoint(run, 15)
        assert f"the last good checkpoint is {branch.output_dir}/checkpoint-15." in str(run.diverged(""))


def test_settings_without_influence_on_the_weights_may_change(config):
    start(config)
    assert {"save_steps", "report_to"} <= FREE_KEYS
    assert opened(replace(config, save_steps=99, report_to=["tensorboard"])) is None


def test_more_skipped_images_may_be_allowed_when_a_run_has_stopped_on_them(config):
    start(config)
    assert opened(replace(config, data=Data(max_skipped_fraction=0.2))) is None


def test_the_advice_comes_before_any_number_of_differences(config):
    start(config)
    with pytest.raises(ConfigError, match=r"--allow_config_changes true(.|\n)*and 11 more"):
        opened(replace(config, model={str(number): 1 for number in range(28)}))


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_with_each_key(config, finished):
    start(config)
    if finished:
        shutil.rmtree(Path(config.output_dir) / "checkpoint-10")
        with RunFolder(config) as run:
            run.finish(20, {})
    changed = replace(
        config, learning_rate=0.1, part=Part(rotate=2.0, save_steps=9), model={"widths": [1, 3], "new": 1}
    )
    with pytest.raises(ConfigError) as caught:
        opened(changed)
    found = {problem.key: problem.message for problem in caught.value.problems}
    # a nested key with the name of a key that may change is still compared
    keys = {"learning_rate", "part.rotate", "part.save_steps", "model.widths", "model.cost", "model.new"}
    assert set(found) == {*keys, "output_dir"}
    assert found["learning_rate"] == "the run was started with 1e-05, now it is 0.1"
    assert config.output_dir in found["output_dir"]
    assert load_config(Run, f"{config.output_dir}/{CONFIG_NAME}") == config  # nothing was overwritten


def test_a_key_that_is_newer_than_the_run_had_its_default(config):
    start(config)
    path = Path(config.output_dir) / CONFIG_NAME
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.lstrip().startswith(("rotate:", "learning_rate:"))]
    assert len(kept) < len(lines) - 1
    path.write_text("\n".join(kept))
    with pytest.raises(ConfigError) as caught:
        opened(replace(config, part=Part(rotate=2.0)))
    assert {problem.key for problem in caught.value.problems} == {"part.rotate", "output_dir"}
    assert opened(config) is None


def test_a_tuple_is_the_list_it_becomes_in_yaml(config):
    tupled = replace(config, model={"widths": (1, 2), "cost": 0.25})
    start(tupled)
    assert opened(tupled) is None
    assert opened(config) is None


def test_changes_can_be_allowed(config, caplog):
    start(config)
    changed = replace(config, learning_rate=0.1, max_steps=30, allow_config_changes=True)
    with caplog.at_level(logging.WARNING):
        assert opened(changed) is None
    assert "learning_rate: 1e-05 -> 0.1" in caplog.text and "max_steps: 20 -> 30" in caplog.text
    assert opened(changed) is None  # the changed settings are saved
    with pytest.raises(ConfigError, match="learning_rate"):
        opened(config)


def test_a_finished_run_can_be_lengthened(config):
    with RunFolder(config) as run:
        run.begin(1)
        checkpoint(run, 20)
        run.finish(20, {})
    longer = replace(config, max_steps=30)
    with pytest.raises(
        ConfigError, match=r"allow_config_changes[^$]*max_steps: the run was started with 20, now it is 30"
    ):
        opened(longer)
    assert opened(config) is not None
    with RunFolder(replace(longer, allow_config_changes=True)) as run:
        assert run.results is None
        assert run.begin(1).step == 20


def test_the_log_is_cut_back_to_the_checkpoint(config):
    start(config)
    log = Path(config.output_dir) / LOG_NAME
    with open(log, "a") as file:
        file.write('{"step": 16, "lo')  # an incomplete line
    with RunFolder(config) as run:
        assert run.begin(1).step == 10
        run.log(11, {})
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [5, 10, 11]


@pytest.mark.parametrize(
    "line",
    [
        b"3",
        b"null",
        b"[1]",
        b"{}",
        b'{"step": "5"}',
        b'{"step": null}',
        b"\xff\xfe",
        b"[" * 5000,
        b"",
        b'{"step": 1e999}',
    ],
)
def test_a_damaged_line_of_the_log_is_dropped(config, line):
    start(config)
    log = Path(config.output_dir) / LOG_NAME
    log.write_bytes(log.read_bytes() + line + b"\n" + b'{"step": 8}\n')
    with RunFolder(config) as run:
        run.begin(1)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [5, 10, 8]


# contents of config.yaml, words of the message
DAMAGED_SETTINGS = {
    "not YAML": (b"output_dir: [", "config.yaml: 1 problem\n  - not valid YAML"),
    "not text": (b"\xff\xfe\x00", "config.yaml: 1 problem\n  - is not a text file"),
    "a list": (b"- 1\n", "holds a list"),
    "a bomb": (
        b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b"*a%d," % (n - 1) * 9) for n in range(1, 99)),
        "more",
    ),
    "an object": (b"!!python/object/apply:os.system [id]", "a tag"),
    "a number as key": (b"1: 2\n", "keys must be words"),
    "a repeated key": (b"max_steps: 20\nmax_steps: 30\n", "is given twice"),
    "a secret key": (
        b"training_arguments: {hub_token: hunter2}\n",
        "training_arguments.hub_token: a secret is saved here",
    ),
    "a secret": (
        b"output_dir: hf_" + b"aB3dE5gH7j" * 4 + b"\n",
        "output_dir: a secret is saved here; remove this line",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_SETTINGS)
def test_damaged_settings_are_named(config, case):
    data, words = DAMAGED_SETTINGS[case]
    start(config)
    (Path(config.output_dir) / CONFIG_NAME).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        opened(config)
    message = str(caught.value)
    assert message.startswith(f"{config.output_dir}/{CONFIG_NAME}: 1 problem\n") and words in message
    assert "hunter2" not in message and "hf_aB3" not in message


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"{}", b'{"global_step": "20"}', b'{"global_step": true}', b'{"global_step": -1}', b"\xff"],
)
def test_damaged_results_are_named(config, data):
    start(config)
    path = Path(config.output_dir) / "train_results.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"output_dir: {path} is damaged .* remove it"):
        opened(config)
    path.unlink()
    assert opened(config) is None  # as the message says


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"pid": 3, "host": "\\u001b[31m", "since": "then"}'])
def test_a_damaged_name_of_the_holder_is_passed_over(config, data):
    with RunFolder(config):
        (Path(config.output_dir) / OWNER_NAME).write_bytes(data)
        with pytest.raises(ConfigError, match=r"is in use by (another process|process 3 on \\x1b\[31m since then)"):
            RunFolder(config).__enter__()


def test_differences_are_cut_and_redacted(config, caplog):
    start(replace(config, model={"text": "a" * 5000, "list": list(range(5000))}))
    changed = replace(config, model={"text": "b\x1b" * 5000, "list": []})
    with pytest.raises(ConfigError) as caught:
        opened(changed)
    assert len(str(caught.value)) < 1500 and "\x1b" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        opened(replace(changed, allow_config_changes=True))
    assert 100 < len(caplog.text) < 600 and "\x1b" not in caplog.text


def test_another_number_of_processes_is_refused(config):
    start(config)
    with RunFolder(config) as run, pytest.raises(ConfigError, match=r"received 2, but .*checkpoint-10 was saved by 1"):
        run.begin(2)
    with RunFolder(replace(config, allow_config_changes=True)) as run:
        assert run.begin(2).step == 10


def test_settings_are_compared_with_those_of_the_checkpoints_run(config, tmp_path):
    start(config)
    branch = replace(
        config, output_dir=str(tmp_path / "branch"), resume_from_checkpoint=f"{config.output_dir}/checkpoint-10"
    )
    with RunFolder(branch) as run:
        assert run.begin(1).step == 10
    with RunFolder(replace(branch, learning_rate=0.1)) as run, pytest.raises(ConfigError, match="learning_rate"):
        run.begin(1)


def test_seconds_add_up_over_sessions(config):
    with RunFolder(config) as run:
        run.begin(1)
        run._started -= 100
        checkpoint(run, 10)
    with RunFolder(config) as run:
        assert run.seconds < 50
        run.begin(1)
        assert 100 < run.seconds < 150


def test_a_start_that_is_refused_changes_nothing(config):
    """The folder stays the same if the check of the folder fails, or if an error occurs before the first step."""
    start(config)
    with RunFolder(config) as run:
        run.begin(1)
        run.finish(20, {})
    files = {path.name: path.read_bytes() for path in Path(config.output_dir).iterdir() if path.is_file()}
    with pytest.raises(ZeroDivisionError), RunFolder(replace(config, max_steps=30, allow_config_changes=True)):
        raise ZeroDivisionError  # stands for an error in building the data or the model
    shorter = replace(config, max_steps=8, allow_config_changes=True)
    (Path(config.output_dir) / "train_results.json").unlink()
    with RunFolder(shorter) as run, pytest.raises(ConfigError, match="max_steps: received 8"):
        run.begin(1)
    del files["train_results.json"]
    left = {path.name: path.read_bytes() for path in Path(config.output_dir).iterdir() if path.is_file()}
    assert left == files


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_a_link_or_into_a_pipe(config, tmp_path, name, kind):
    victim, planted = tmp_path / "victim", Path(config.output_dir) / name
    victim.write_text("precious")
    planted.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        planted.symlink_to(victim)
    else:
        os.mkfifo(planted)
    with pytest.raises((OSError, ConfigError), match=name), RunFolder(config) as run:
        run.log(1, {"loss": 0.5})
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("allowed", [False, True])
def test_the_folder_of_another_command_is_refused_in_one_sentence(tmp_path, allowed):
    folder = str(tmp_path / "run")
    first, second = Stage1Like(output_dir=folder), Stage2Like(output_dir=folder, allow_config_changes=allowed)
    with RunFolder(first) as run:
        run.begin(1)
        run.finish(20, {})
    with pytest.raises(ConfigError, match=r"1 problem\n  - output_dir: .* holds a run of another command") as caught:
        opened(second)
    assert "with discriminator, codebook; choose another output_dir" in str(caught.value)
    assert opened(first)["global_step"] == 20
