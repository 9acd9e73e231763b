"""The benchmarks of a GPU, rehearsed without one: all lanes run with tiny models, and the program keeps what it has."""

import argparse
import json
import subprocess
import sys
import time
from functools import cache

import pytest
import torch

from benchmarks import decode_attention, gpu, inventory, run
from benchmarks.machine import Ceilings
from tests import cuda_graphs
from tests.slow import few

CEILINGS = Ceilings(matmul=1e12, conv=1e12, copy=1e12)
CUDA = torch.device("cuda")
TRAINING = "training step f16 batch 64", "prior training 111M"
SAMPLING = "sampling 111M 64, 2, codes", "sampling 111M 2, images"


cases_of = cache(run.cases_of)


def chosen(suite, rows, lanes=(), device=CUDA):
    return run.chosen(cases_of(suite, device), rows, lanes)


@pytest.mark.slow
def test_every_row_has_cases_and_lanes():
    """Building the cases checks the settings. The bounds are computed from models without memory."""
    for row in gpu.ROWS.values():
        cases, tiny = (chosen(suite, row.cases, row.lanes) for suite in ("gpu", "tiny"))
        assert len(cases) >= len(row.cases) and {case.row for case in cases} == {case.row for case in tiny}
        for case in cases + tiny:
            assert len(case.lanes) > 1, case.name
    for case in chosen("gpu", ["step batch 64", "775M", "343M 256, 2, codes", "343M 2, images", "encode f16"]):
        operations = case.operations() if callable(case.operations) else case.operations
        assert (case.floor(CEILINGS) if case.floor else operations) > 0


def test_unknown_rows_and_lanes_are_refused():
    with pytest.raises(ValueError, match="no name has the words 'enkode f16'"):
        chosen("gpu", ["enkode f16"])
    with pytest.raises(ValueError, match="'releasd'; names are: tessella"):
        chosen("gpu", ["encode f16"], ["releasd"])


@pytest.mark.parametrize(
    "words",
    few([*TRAINING, "encode", "decode f16", "code search 256", *SAMPLING], "encode"),
)
def test_every_lane_runs_with_a_tiny_model(words, monkeypatch):
    """Without compilation, which takes minutes: `python -m benchmarks.gpu rows --rehearse` also traces the models."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    (case,) = chosen("tiny", [words], device=torch.device("cpu"))
    assert case.agree() and len(case.lanes) > 1
    for prepare in case.lanes.values():
        prepare()()


@pytest.mark.slow
def test_every_lane_can_be_traced(tmp_path, monkeypatch):
    rows = [words for row in gpu.ROWS.values() for words in row.cases if "attention" not in words]
    arguments = ["--suite", "tiny", "--rounds", "3", "--output", str(tmp_path / "tiny.json"), "--rows", *rows]
    monkeypatch.setattr("sys.argv", ["run", *arguments])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 0


@pytest.mark.parametrize("lane", decode_attention.LANES)
def test_attention_is_captured_as_a_graph(lane, monkeypatch):
    """The graph is simulated, and torch's attention stands for the kernel, which runs on a GPU only."""
    cuda_graphs.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    cpu = torch.device("cpu")
    monkeypatch.setitem(decode_attention.LANES, "tessella", decode_attention.exact)
    assert decode_attention.agree(2, 5, cpu)["largest difference"].keys() == decode_attention.LANES.keys()
    with torch.inference_mode():  # as the simulated graph needs it
        found = decode_attention.prepared(lane, 2, 5, cpu)()
    expected = decode_attention.exact(decode_attention.Inputs.random(2, 5, cpu))
    assert len(found) == decode_attention.LAYERS
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def stage(folder, *arguments, budget=1000.0):
    values = {"output": str(folder), "only": [], "rehearse": True, **dict(arguments)}
    return gpu.Stage(argparse.Namespace(**values), gpu.Budget(budget))


def test_a_program_that_takes_too_long_is_stopped(tmp_path):
    sleeps = ["timeit", "-n1", "-r1", "import time; print('begins', flush=True); time.sleep(60)"]
    since = time.monotonic()
    assert stage(tmp_path).run("a long one", 3, sleeps)["ended"] == "stopped"
    assert time.monotonic() - since < 30 and "begins" in (tmp_path / "log.txt").read_text()
    assert stage(tmp_path).run("a wrong one", 30, ["timeit", "1/0"])["ended"] == "failed with exit code 1"
    assert stage(tmp_path).run("a short one", 30, ["timeit", "-n1", "1"])["ended"] == "passed"


def test_what_does_not_fit_the_budget_is_named_and_does_not_start(tmp_path, capsys):
    assert not gpu.rows(stage(tmp_path, ("only", ["encode", "attention"]), budget=0.5))
    results = json.loads((tmp_path / "rows.json").read_text())
    assert list(results) == ["encode", "attention"]
    assert all(result["ended"].startswith("not run: it may take") for result in results.values())
    assert "row attention: not run: it may take 60 s, and 0 s are left" in capsys.readouterr().out


def test_a_row_that_is_stopped_keeps_its_cases(tmp_path, monkeypatch, capsys):
    lane = {"per_second": 2.0, "time_ratio": {"median": 1.0}, "of_floor": 0.5, "mfu": None}
    case = {"row": "encode", "setting": "f16", "unit": "images/s", "lanes": {"tessella": lane}, "failed": {"b": "why"}}

    def stopped(command, limit, log):
        written.append(command[command.index("--output") + 1])
        if len(written) == 1:
            (tmp_path / "row.json").write_text(json.dumps({"cases": [case, {**case, "lanes": {}, "error": "broken"}]}))
        return {"ended": "stopped", "seconds": 1.0}

    written = []
    monkeypatch.setattr(gpu, "run_module", stopped)
    assert not gpu.rows(stage(tmp_path, ("only", ["encode", "attention"])))
    results = json.loads((tmp_path / "rows.json").read_text())
    assert results["encode"]["cases"][0] == case and results["attention"] == {"ended": "stopped", "seconds": 1.0}
    assert set(written) == {str(tmp_path / "row.json")} and not (tmp_path / "row.json").exists()
    out = capsys.readouterr().out
    assert "2 images/s" in out and "f16, b: why" in out and "encode, f16: broken" in out


def test_tests_are_lines_of_a_file_as_they_end(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert 1 == 2\n\n"
        "@pytest.fixture\ndef broken(): raise OSError('no disk')\n\ndef test_unready(broken): pass\n\n"
        "@pytest.mark.skip(reason='not here')\ndef test_elsewhere(): pass\n"
    )
    plugin = ["-p", "benchmarks.test_log", "--log_to", str(tmp_path / "log.jsonl"), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "--noconftest", "-c", "/dev/null", *plugin, str(tmp_path / "test_it.py")]
    assert subprocess.run(command, cwd=gpu.ROOT, capture_output=True).returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = {line["test"].partition("::")[2]: line for line in lines}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_unready": "failed", "test_elsewhere": "skipped"
    }  # fmt: skip
    assert "assert 1 == 2" in found["test_bad"]["reason"] and "no disk" in found["test_unready"]["reason"]


def test_the_tests_that_are_named_exist():
    for group in gpu.TESTS.values():
        files = [word for word in group.arguments if word.startswith("tests/")]
        text = "".join((gpu.ROOT / file).read_text() for file in files) + " ".join(files)
        words = group.arguments[group.arguments.index("-k") + 1]
        for word in words.removeprefix("not (").removesuffix(")").split(" or "):
            assert word in text, f"{word}: no test of {files} has such a name"


def test_all_requirements_are_carried_or_assumed():
    found = {package.requirement.name: package for package in inventory.packages()}
    needed = {name for name, package in found.items() if package.is_needed}
    carried = {line.partition("#")[0] for line in (gpu.ROOT / "benchmarks" / "wheels.txt").read_text().split("\n")}
    names = {name for name in found if any(line.startswith(name) for line in carried)}
    assert needed - names == inventory.ASSUMED and not names & inventory.ASSUMED


def test_a_missing_requirement_is_named(monkeypatch):
    def version(name):
        if name in ("pydantic", "dill"):
            raise inventory.metadata.PackageNotFoundError(name)
        return "0.0.1"

    monkeypatch.setattr(inventory.metadata, "version", version)
    monkeypatch.setattr(
        inventory, "imported", lambda module: "ImportError: no such module" if module == "tessella" else ""
    )
    found, missing = inventory.inventory()
    assert "tessella: ImportError: no such module" in missing and "a card that torch finds" in missing
    assert any(line.startswith("pydantic") for line in missing) and not any(line.startswith("dill") for line in missing)
    assert found["optional, missing"] == ["dill<0.4.2,>=0.3.0"]
    assert any(line.startswith("torch 0.0.1, asked for torch<3,>=2.11") for line in found["other versions"])
