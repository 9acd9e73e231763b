"""The non-public functions that the image data relies on: these tests fail when a new release changes them."""

import io
import tarfile

import psutil
import pytest
import torch
from datasets.packaged_modules.webdataset import webdataset

from stage1_vqgan.compat import restrict_webdataset, shared_memory


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


def test_datasets_reads_the_files_of_a_tar_as_the_check_yields_them(tmp_path, monkeypatch):
    reader = webdataset.WebDataset
    for owner, name in ((reader, "DECODERS"), (webdataset, "EXTENSION_TO_COMPRESSION_FS_FILE_CLS")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(reader, "_get_pipeline_from_tar", vars(reader)["_get_pipeline_from_tar"])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("1.cls", "1.npy", "1.txt.gz", "2.cls"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"7"))
    seen = []

    def check(path, files):
        seen.append(path)
        return ((name, file) for name, file in files if name != "2.cls")

    restrict_webdataset({"cls"}, check)
    path = str(tmp_path / "a.tar")
    files = webdataset.datasets.DownloadManager().iter_archive(path)
    (example,) = reader._get_pipeline_from_tar(path, files)
    assert (example["cls"], example["npy"], example["txt.gz"]) == (7, b"7", b"7")
    assert seen == [path]
