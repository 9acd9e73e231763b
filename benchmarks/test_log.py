"""A plugin of pytest: `pytest -p benchmarks.test_log --log_to FILE` writes a line of JSON for each test as it ends."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--log_to", type=Path, required=True, help="file to which the lines are appended")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of a worker of pytest-xdist; the main process also gets its reports
        config.pluginmanager.register(Log(config.getoption("log_to")))


class Log:
    """Appends the outcome of each test to a file. A failed or skipped set-up counts as the outcome of its test."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            reason = {} if report.passed else {"reason": report.longreprtext[-2000:]}
            with self.path.open("a") as file:
                file.write(json.dumps(line | reason) + "\n")
