"""Damaged and hostile data: parquet files, tars and folders are refused in our words, or give the images they hold."""

import gzip
import io
import os
import pickle
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import ConfigError
from stage1_vqgan import DataConfig, ImageStream, load_images
from stage1_vqgan.data.decoding import UndecodableImage
from tests.fuzz.harness import cases, damaged, generator, in_processes, outcome, planted_pickle
from tests.image_files import picture, value_of, write_folder, write_parquet, write_tar

pytestmark = pytest.mark.usefixtures("datasets_cache")
IMAGES, LABELS = [10, 20, 30, 40, 50, 60], [2, 0, 1, 1, 0, 2]


def png(value):
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


def opened(path, streaming, **settings):
    """(value, label) of the images of both splits, in order of the values; the value of a skipped image is -1."""
    config = DataConfig(dataset=str(path), streaming=streaming, **settings)
    if streaming:  # one split is enough; a tar has no known length to hold out images of
        config.validation_split = config.train_split
    train, validation = load_images(config)
    found = []
    for source in [train] if streaming else [train, validation]:
        stream = isinstance(source, ImageStream)
        pairs = source.read() if stream else zip(source.encoded(range(len(source))), labels_of(source), strict=True)
        found += [(value_or_skipped(encoded), label) for encoded, label in pairs]
    return sorted(found, key=str)


def labels_of(source):
    return [None] * len(source) if source.labels is None else source.labels.tolist()


def value_or_skipped(encoded):
    try:
        return value_of(encoded)
    except UndecodableImage:
        return -1


def read(path, streaming, scratch, **settings):
    return outcome(lambda: opened(path, streaming, **settings), (ConfigError,), scratch)


def write(kind, path):
    if kind == "tar":
        write_tar(path, IMAGES, cls=LABELS)
    else:
        rows = {"picture": [picture(value) for value in IMAGES], "y": LABELS}
        write_parquet(path, rows, y=datasets.ClassLabel(names=["a", "b", "c"]))
    return path.read_bytes()


def check(numbers, scratch):
    datasets.config.HF_DATASETS_CACHE = scratch / f"cache{numbers[0]}"
    datasets.disable_progress_bars()
    refused, whole = 0, {kind: write(kind, scratch / f"whole.{kind}") for kind in ("tar", "parquet")}
    for number in numbers:
        draw = generator("data files", number)
        kind, streaming = draw.choice(["tar", "parquet"]), draw.random() < 0.5
        path = scratch / f"{number}.{kind}"
        path.write_bytes(damaged(whole[kind], draw))
        found = read(path, streaming, scratch)
        refused += isinstance(found, ConfigError)
        if not isinstance(found, ConfigError):  # labels and names have no checksums in the files; PNGs have
            values = [value for value, _ in found]
            assert len(values) == len(IMAGES) and set(values) <= {*IMAGES, -1}, number
    assert refused >= len(numbers) / 4


@cases(short=16, long=200)
def test_a_damaged_file_is_refused_or_gives_all_images(tmp_path, numbers):
    in_processes(check, numbers, tmp_path)


def members(path, files, mode="w"):
    """Writes a tar of (name or TarInfo, content)."""
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def with_others(extension, content):
    return [file for n in range(4) for file in ((f"{n}.png", png(n)), (f"{n}.{extension}", content))]


def special(kind, name, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member, b""


FOUR = [(f"{n}.png", png(n)) for n in range(4)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "npy", "npz", "ten", "msg", "cbor", "json"])
def test_files_in_a_tar_are_not_unpickled(tmp_path, streaming, extension):
    canary = tmp_path / "canary"
    content = planted_pickle(canary)
    if extension == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([pickle.loads(pickle.dumps(None))], dtype=object), allow_pickle=True)
        content = buffer.getvalue().replace(buffer.getvalue()[128:], content)
    path = members(tmp_path / "a.tar", with_others(extension, content))
    found = read(path, streaming, tmp_path)
    assert [value for value, _ in found] == [0, 1, 2, 3] and not canary.exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_names_and_links_in_a_tar_lead_nowhere(tmp_path, streaming):
    names = [("../../../../0.png", png(0)), ("/1.png", png(1)), ("a/../../2.png", png(2)), ("b\n3.png", png(3))]
    links = [
        special(tarfile.SYMTYPE, "4.png", "/etc/passwd"),
        special(tarfile.LNKTYPE, "5.png", "../../../../0.png"),
        special(tarfile.CHRTYPE, "6.png"),
        special(tarfile.FIFOTYPE, "7.png"),
    ]
    found = read(members(tmp_path / "a.tar", names + links), streaming, tmp_path)
    assert [value for value, _ in found] == [0, 1, 2, 3]


def sparse_tar(path):
    """A tar with a file of 8 GB that consists of a hole."""
    member = tarfile.TarInfo("0.png")
    member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**33), "GNU.sparse.numblocks": "1"}
    return members(path, [(member, b""), *FOUR[1:]])


def with_header(path, number, offset, value):
    """A tar with other bytes in the header of a file, and a checksum that fits."""
    content = bytearray(members(path, FOUR).read_bytes())
    start = content.index(b"%d.png" % number)
    content[start + offset : start + offset + len(value)] = value
    header = content[start : start + 512]
    header[148:156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)
    return path


def cut(path, size):
    path.write_bytes(members(path, FOUR).read_bytes()[:size])
    return path


TARS = {
    "a hole": (sparse_tar, "more than the tar itself"),
    "a compressed tar": (lambda path: members(path, FOUR, "w:gz"), "is compressed; unpack it"),
    "a huge size": (lambda path: with_header(path, 2, 124, b"77777777777\0"), "more than the tar itself"),
    "cut between files": (lambda path: cut(path, 2048), "is cut short"),
    "cut in a header": (lambda path: cut(path, 2300), "is cut short"),
    "cut in a file": (lambda path: cut(path, 2600), "unexpected end of data"),
    "digits without end": (lambda path: members(path, with_others("cls", b"9" * 5000)), "data.label_column: "),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", TARS)
def test_a_tar_that_cannot_be_right_is_refused(tmp_path, streaming, kind):
    make, message = TARS[kind]
    found = read(make(tmp_path / "a.tar"), streaming, tmp_path)
    assert isinstance(found, ConfigError) and message in str(found)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path, streaming):
    """tarfile itself stops there, so half of the images would be missing."""
    content = bytearray(members(tmp_path / "a.tar", FOUR).read_bytes())
    content[2048 + 20] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    found = read(tmp_path / "a.tar", streaming, tmp_path)
    assert isinstance(found, ConfigError) and "the header at byte 2,048 is damaged" in str(found)


@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_files_in_a_tar_are_not_unpacked(tmp_path, streaming):
    path = members(tmp_path / "a.tar", [(f"{n}.png.gz", gzip.compress(png(n))) for n in range(4)])
    found = read(path, streaming, tmp_path, image_column="png.gz")
    assert [value for value, _ in found] == [-1] * 4


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_bomb_is_refused(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr("stage1_vqgan.data.splits.LARGE_GROUP", 2**20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes(2**21), b""]}), path, compression="zstd")
    found = read(path, streaming, tmp_path)
    assert isinstance(found, ConfigError) and "but a row group of it unpacks to 2,097," in str(found)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", [[None] * 4, [b""] * 4, [b"no image"] * 4, ["no/such/file"] * 4, [1] * 4], ids=str)
def test_values_that_are_no_images_are_skipped_or_refused(tmp_path, streaming, column):
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", streaming, tmp_path)
    assert isinstance(found, ConfigError) or [value for value, _ in found] == [-1] * 4


def test_scripts_and_pickles_beside_the_data_do_not_run(tmp_path):
    folder, canary = tmp_path / "data", tmp_path / "canary"
    write_folder(folder, {f"{n}.png": n for n in range(4)})
    for name in ("data.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')\n")
    for name in ("state.pkl", "dataset.dill", "train.pth", "dataset_info.json"):
        (folder / name).write_bytes(planted_pickle(canary))
    assert [value for value, _ in read(folder, False, tmp_path)] == [0, 1, 2, 3] and not canary.exists()


def test_links_in_a_folder_are_followed_and_devices_are_skipped(tmp_path):
    """A link is the decision of the person who made the folder: an image outside is read, as if it were in it."""
    write_folder(tmp_path / "outside", {"1.png": 1})
    folder = tmp_path / "data"
    write_folder(folder, {"0.png": 0, "2.png": 2})
    (folder / "1.png").symlink_to(tmp_path / "outside" / "1.png")
    (folder / "3.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "4.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "5.png")
    with open(folder / "6.png", "wb") as file:
        file.truncate(2**40)
    (folder / "back").symlink_to(tmp_path)
    found = read(folder, False, tmp_path)
    assert [value for value, _ in found] == [-1, -1, -1, -1, 0, 1, 2]
