"""The non-public functions that the image data relies on: these tests fail when a new release changes them."""

import io
import tarfile

import psutil
import pytest
import torch
from datasets.packaged_modules.webdataset import webdataset

from stage1_vqgan.compat import replace_webdataset_reader, shared_memory


def write(storage, value):
    torch.empty(0, dtype=torch.uint8).set_(storage)[:4] = value


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
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


def test_datasets_infers_the_types_of_the_samples_that_the_reader_yields(tmp_path, monkeypatch, datasets_cache):
    reader = webdataset.WebDataset
    for name in ("IMAGE_EXTENSIONS", "_get_pipeline_from_tar"):
        monkeypatch.setattr(reader, name, vars(reader)[name])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("1.cls", "2.cls"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"7"))
    seen = []

    def samples(path, files):
        seen.append(path)
        for name, file in files:
            yield {"image": b"pixels", "cls": f"{name}: {file.read()}", "__key__": name, "__url__": path}

    replace_webdataset_reader(samples, "image")
    path = str(tmp_path / "a.tar")
    rows = webdataset.datasets.load_dataset("webdataset", data_files={"train": [path]}, split="train")
    assert rows["cls"][:] == ["1.cls: b'7'", "2.cls: b'7'"] and set(seen) == {path}
    assert rows.cast_column("image", webdataset.datasets.Image(decode=False))[1]["image"]["bytes"] == b"pixels"
    assert isinstance(rows.features["image"], webdataset.datasets.Image)
