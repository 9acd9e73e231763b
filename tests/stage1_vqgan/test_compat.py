"""The non-public functions that the image data relies on: these tests fail when a new release changes them."""

import psutil
import pytest
import torch

from stage1_vqgan.compat import shared_memory


def write(storage, value):
    torch.empty(0, dtype=torch.uint8).set_(storage)[:4] = value


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shared_memory_is_written_by_another_process(method):
    storage = shared_memory(2**20)
    assert storage.nbytes() == 2**20 and storage.is_shared()
    worker = torch.multiprocessing.get_context(method).Process(target=write, args=(storage, 7))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert torch.empty(0, dtype=torch.uint8).set_(storage)[:6].tolist() == [7, 7, 7, 7, 0, 0]


def test_shared_memory_takes_no_pages_before_it_is_written():
    process = psutil.Process()
    before = process.memory_info().rss
    storage = shared_memory(2**28)
    assert process.memory_info().rss - before < 2**26
    torch.empty(0, dtype=torch.uint8).set_(storage)[: 2**27] = 1
    assert process.memory_info().rss - before > 2**26
