"""Writes image folders, parquet files and tars for tests. The pixel value of an image identifies it."""

import io
import tarfile

import datasets
from PIL import Image

from stage1_vqgan import ImageStream, decode


def picture(value, size=(8, 6)):
    """An image whose pixels all have one value, which identifies it."""
    return Image.new("RGB", size, (value, 255 - value, value // 2))


def value_of(encoded):
    return decode(encoded).convert("RGB").getpixel((0, 0))[0]


def read(source, **where):
    """(value, label) of every image."""
    if isinstance(source, ImageStream):
        return [(value_of(encoded), label) for encoded, label in source.read(**where)]
    labels = [None] * len(source) if source.labels is None else source.labels.tolist()
    return list(zip(map(value_of, source.encoded(range(len(source)))), labels, strict=True))


def values(source):
    return [value for value, _ in read(source)]


def write_folder(root, layout):
    for name, value in layout.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(root / name)
    return str(root)


def write_parquet(path, rows, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"picture": datasets.Image(), **columns})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def write_tar(path, images, kind="png", **fields):
    """Writes a webdataset tar: for each image, `NNNN.<kind>` and text files `NNNN.<field>`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, value in enumerate(images):
            buffer = io.BytesIO()
            picture(value).save(buffer, kind)
            parts = {kind: buffer.getvalue()} | {name: str(text[number]).encode() for name, text in fields.items()}
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)
