"""Compression: exact round trips, as many bits as the prior's likelihood says, and refusals of wrong data."""

import copy
import dataclasses
import random
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from pipelines import compressed_file
from stage2_prior import read_codes
from tests.devices import DEVICE

pytest.importorskip("constriction")

OVERHEAD = 47  # bytes of the header and the checksums


@pytest.fixture(scope="module")
def codes(tiny_pipeline):
    """The codes of 200 digits, int64 (200, 4, 4)."""
    digits = np.round(load_digits().images[:200] * (255 / 16)).astype(np.uint8)
    return tiny_pipeline.encode([Image.fromarray(digit) for digit in digits]).cpu()


@pytest.fixture(scope="module")
def labels():
    return load_digits().target[:200]


@torch.no_grad()
def bits(pipeline, codes, conditions):
    """-log2 of the probability with which the prior would sample the codes, in one forward."""
    flat = codes.flatten(1)
    tokens = torch.cat([conditions[:, None], flat[:, :-1]], 1)
    logits = pipeline.prior(tokens.to(DEVICE)).logits[..., : pipeline.layout.num_codes].double().cpu()
    return F.cross_entropy(logits.flatten(0, 1), flat.flatten(), reduction="sum").item() / np.log(2)


@pytest.mark.parametrize("batch_size", [None, 64])
def test_codes_survive_in_as_many_bits_as_their_likelihood_says(tiny_pipeline, codes, batch_size):
    data = tiny_pipeline.compress(codes=codes, batch_size=batch_size)
    back = tiny_pipeline.decompress(data, "codes")
    assert torch.equal(back.cpu(), codes)
    expected = bits(tiny_pipeline, codes, torch.full((200,), tiny_pipeline.layout.null_token))
    assert 8 * (len(data) - OVERHEAD) == pytest.approx(expected, rel=0.01)
    assert 8 * (len(data) - OVERHEAD) <= 1.01 * tiny_pipeline.score(codes=codes).nats.sum().item() / np.log(2)


def test_data_are_read_with_the_number_of_threads_that_wrote_them(tiny_pipeline, codes, monkeypatch):
    """Sums of several threads are rounded otherwise."""
    before, used = torch.get_num_threads(), []

    def read(*arguments):
        used.append(torch.get_num_threads())
        return read_codes(*arguments)

    monkeypatch.setattr("pipelines.compression.read_codes", read)
    try:
        torch.set_num_threads(2)
        data = tiny_pipeline.compress(codes=codes)
        torch.set_num_threads(1)
        assert torch.equal(tiny_pipeline.decompress(data, "codes").cpu(), codes)
        assert used == [2] and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_labels_are_kept_and_used(tiny_pipeline, codes, labels):
    data = tiny_pipeline.compress(codes=codes, class_labels=labels)
    assert torch.equal(tiny_pipeline.decompress(data, "codes").cpu(), codes)
    expected = bits(tiny_pipeline, codes, tiny_pipeline.layout.class_tokens(torch.from_numpy(labels)))
    assert 8 * (len(data) - OVERHEAD) == pytest.approx(expected + 200 * np.log2(10), rel=0.01)


def test_images_come_back_as_reconstructions(tiny_pipeline):
    images = [Image.fromarray(np.full((16, 16), level, np.uint8)) for level in (0, 99, 255)]
    back = tiny_pipeline.decompress(tiny_pipeline.compress(images, class_labels="3"))
    assert [a.tobytes() for a in back] == [b.tobytes() for b in tiny_pipeline.reconstruct(images)]


def damaged(data, rng):
    """The data with one damage of any kind."""
    kind, at = rng.randrange(6), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data + rng.randbytes(rng.choice([1, 4, 64]))
    if kind == 3:
        return data[:at] + rng.randbytes(4) + data[at:]
    if kind == 4:
        return data[:at] + data[at + 4 :] if at + 4 < len(data) else data[:-4]
    return rng.randbytes(len(data))


def test_damaged_data_are_refused(tiny_pipeline, codes):
    data, rng = tiny_pipeline.compress(codes=codes[:9]), random.Random(0)
    for number in range(60):
        with pytest.raises(ValueError, match=r"^data: "):
            tiny_pipeline.decompress(damaged(data, rng) if number else b"")
    for wrong in (None, 3, "text", [data]):
        with pytest.raises(ValueError, match=r"data: received .*; must be the bytes"):
            tiny_pipeline.decompress(wrong)


def test_wrong_bits_are_noticed_without_a_wrong_checksum(tiny_pipeline, codes):
    """As on a machine that computes other probabilities."""
    data, rng = tiny_pipeline.compress(codes=codes[:9]), random.Random(0)
    for _ in range(20):
        body = bytearray(data[:-4])
        body[rng.randrange(OVERHEAD - 4, len(body))] ^= 1 << rng.randrange(8)
        forged = bytes(body) + struct.pack("<I", zlib.crc32(body))
        try:
            with pytest.raises(ValueError, match="data: this machine computes other probabilities"):
                tiny_pipeline.decompress(forged)
        except pytest.fail.Exception:  # the last bits may have no meaning
            assert torch.equal(tiny_pipeline.decompress(forged, "codes").cpu(), codes[:9])


def test_data_of_others_are_refused(tiny_pipeline, codes):
    data = tiny_pipeline.compress(codes=codes[:2], class_labels=0)

    def refusal(**changes):
        other = copy.copy(tiny_pipeline)
        vars(other).update(changes)
        with pytest.raises(ValueError) as error:
            other.decompress(data)
        return str(error.value)

    layout = tiny_pipeline.layout
    prior = copy.deepcopy(tiny_pipeline.prior)
    assert refusal(prior=copy.deepcopy(prior).bfloat16()).startswith("data: the prior had the dtype float32")
    with torch.no_grad():
        next(prior.parameters())[0, 0] += 1e-3
    assert refusal(prior=prior) == "data: another prior compressed them; load that pipeline"
    other = dataclasses.replace(layout, tokenizer_fingerprint="0" * 16)
    assert refusal(layout=other) == "data: another tokenizer compressed them; load that pipeline"
    assert "they hold images of 4×4 codes" in refusal(layout=dataclasses.replace(layout, grid=(4, 2)))
    assert "they have conditions that this pipeline does not have" in refusal(
        layout=dataclasses.replace(layout, class_names=(), class_counts=())
    )

    header, content = compressed_file.unpack(data)
    many = compressed_file.pack(dataclasses.replace(header, images=2**32 - 1), content)
    with pytest.raises(
        ValueError, match="data: received 4,294,967,295 compressed images; decompressing them needs at least"
    ):
        tiny_pipeline.decompress(many)
    newer = compressed_file.pack(dataclasses.replace(header, version=3), content)
    with pytest.raises(ValueError, match="data: received version 3 of the format"):
        tiny_pipeline.decompress(newer)
    for given in (2, 128):
        foreign = compressed_file.pack(dataclasses.replace(header, given=given), content)
        with pytest.raises(ValueError, match="data: they have conditions that this pipeline does not have"):
            tiny_pipeline.decompress(foreign)
    crowded = compressed_file.pack(dataclasses.replace(header, threads=1025), content)
    with pytest.raises(ValueError, match="data: they ask for 1,025 threads of the CPU"):
        tiny_pipeline.decompress(crowded)


def test_a_header_cannot_ask_for_more_memory_than_there_is(tiny_pipeline, codes, monkeypatch):
    """Anyone can write a header with a checksum that is right."""
    header, content = compressed_file.unpack(tiny_pipeline.compress(codes=codes[:2]))
    many = {"images": compressed_file.LARGEST, "batch_size": compressed_file.LARGEST}
    crafted = compressed_file.pack(dataclasses.replace(header, **many), content)
    monkeypatch.setattr("configs.memory.free_memory", lambda device: 2**25)
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=0))
    monkeypatch.setattr("pipelines.compression.read_codes", None)  # it would allocate the memory
    with pytest.raises(ValueError, match="data: they were compressed 65,535 images at once; decompressing them needs"):
        tiny_pipeline.decompress(crafted, "codes")


def test_what_cannot_be_compressed_is_refused(tiny_pipeline, codes, monkeypatch):
    other = copy.copy(tiny_pipeline)
    other.layout = dataclasses.replace(tiny_pipeline.layout, has_null=False)
    with pytest.raises(
        ValueError, match=r"class_labels: this prior was trained without condition dropout, .*; it needs class_labels$"
    ):
        other.compress(codes=codes[:1])
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"pip install 'tessella\[compression\]'"):
        tiny_pipeline.compress(codes=codes[:1])
