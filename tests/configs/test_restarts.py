"""A restarted group gets a store of its own; tests/test_elastic.py restarts real runs."""

import os

import pytest
from torch.distributed import TCPStore

from configs import ConfigError
from configs.restarts import use_new_store

LAUNCHED = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1", "GROUP_WORLD_SIZE": "1"}


@pytest.fixture
def launched(monkeypatch):
    """The environment of a restarted process, and the store of its launcher."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return store


def test_a_restarted_group_leaves_the_store_of_the_launcher(launched, monkeypatch):
    use_new_store()
    port = os.environ["MASTER_PORT"]
    assert port != str(launched.port) and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    monkeypatch.setenv("MASTER_PORT", str(launched.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "1")
    use_new_store()
    assert os.environ["MASTER_PORT"] == port


def test_a_first_start_keeps_it(launched, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    use_new_store()
    assert os.environ["MASTER_PORT"] == str(launched.port)


def test_restarts_of_several_machines_are_refused(launched, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="max_restarts: a launcher starts processes again on one machine only"):
        use_new_store()
