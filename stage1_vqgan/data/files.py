"""Finds the files of a local source, their kind, and the split of each.

Only names below the given folder name a split: a folder given as `/data/test/` is not a test split.
"""

import glob
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal, get_args

from configs import ConfigError
from configs.problems import listed, one_line
from stage1_vqgan.data.arrays import array_extensions, extension_of, plugin_hint, slices_of
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.decoding import readable_extensions
from stage1_vqgan.data.labels import MOST_NAMED, class_name
from stage1_vqgan.data.lists import METADATA_NAMES, READERS

SPLIT_NAMES = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
ALLOWED = (
    "give 'digits', a folder or a list of images, .parquet or .tar files, a pattern ('data/*.tar'), a folder of "
    "save_to_disk, or a Hub dataset id"
)
PackedKind = Literal["parquet", "tar", "list"]
# The kind of a file by its extension.
PACKED: dict[str, PackedKind] = {".parquet": "parquet", ".tar": "tar", **dict.fromkeys(READERS, "list")}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source, by split.

    Attributes:
        kind: kind of all files; a "list" names images, and "saved" is a folder of `Dataset.save_to_disk`.
        splits: paths of the files of every split, sorted.
        roots: for images, the folder of every split whose sub-folders are classes.
        metadata: for images, the files metadata.csv and metadata.jsonl beside them.
    """

    kind: Literal["images", "saved"] | PackedKind
    splits: dict[str, list[Path]]
    roots: dict[str, Path] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)


def find_files(config: DataConfig) -> SourceFiles | None:
    """The files of `config.dataset` if it is a file, a folder or a pattern; None if it may be a Hub id.

    Raises:
        ConfigError: the file or folder does not exist, or holds no usable files.
    """
    name = config.dataset
    path = Path(name).expanduser()
    if path.is_dir():
        return _saved(path, config) or _folder(path, config)
    if path.is_file():
        return SourceFiles(_packed_kind([path], name), {config.train_split: [path]})
    if glob.has_magic(name):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            raise _problem(f"received {name!r}; no file matches this pattern")
        kind = _packed_kind(files, name)
        if config.validation_split is None:
            return SourceFiles(kind, {config.train_split: files})
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        return SourceFiles(kind, _splits_of_names(files, root, config))
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in PACKED:
        raise _problem(f"received {name!r}; there is no such file or folder ({ALLOWED})")
    return None


def class_folders(files: Sequence[Path], root: Path) -> list[str] | None:
    """The class of every file: the first folder below the root. None if all files lie in the root itself.

    Raises:
        ConfigError: some files lie in class folders, others beside these folders.
    """
    parts = [file.relative_to(root).parts for file in files]
    flat = [file for file, names in zip(files, parts, strict=True) if len(names) == 1]
    if len(flat) == len(files):
        return None
    if flat:
        folders = len({names[0] for names in parts if len(names) > 1})
        raise _problem(
            f"{root} holds {folders} sub-folder{'s' * (folders > 1)} of images, which are classes, and "
            f"{_count(flat, 'image')} beside them; move them into a sub-folder, or set data.use_labels to false"
        )
    _tell_of_folders(root, parts)
    return [class_name(names[0]) for names in parts]


def _tell_of_folders(root: Path, parts: Sequence[tuple[str, ...]]) -> None:
    """Warns of folders that may not be the classes that the user has in mind."""
    tops = list(dict.fromkeys(names[0] for names in parts))
    nested = list(dict.fromkeys("/".join(names[:-1]) for names in parts if len(names) > 2))
    if nested and len(tops) == 1:
        message = "%s: all images lie in the one folder %s, so they have no classes; if its folders are classes (%s), "
        logger.warning(message + "set data.dataset to %s", root, tops[0], listed(nested, MOST_NAMED), root / tops[0])
    elif nested:
        logger.warning("%s: a class is a whole folder, with the folders in it (%s)", root, listed(nested, MOST_NAMED))
    splits = [name for name in tops if name.lower() in SPLIT_NAMES]
    if splits and len(tops) > 1:
        message = "%s: %s counts as a class, because other folders there are no splits; move it away if it is a split"
        logger.warning(message, root, ", ".join(splits))


def _saved(root: Path, config: DataConfig) -> SourceFiles | None:
    """The splits of a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`; None if it is no such folder."""
    if (root / "dataset_dict.json").is_file():
        return SourceFiles("saved", {path.parent.name: [path.parent] for path in sorted(root.glob("*/state.json"))})
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        return SourceFiles("saved", {config.train_split: [root]})
    return None


def _folder(root: Path, config: DataConfig) -> SourceFiles:
    extensions = readable_extensions() | array_extensions()
    kinds: dict[str, list[Path]] = {"parquet": [], "tar": [], "images": [], "list": [], "": []}
    for file in _files_below(root):
        extension = extension_of(file)
        is_image = extension in extensions
        kinds["images" if is_image else PACKED.get(extension, "")] += _images_of(file) if is_image else [file]
    lists = kinds.pop("list")
    metadata = [file for file in lists if file.name in METADATA_NAMES]
    others = sorted({*kinds.pop(""), *lists} - {*metadata})
    match [(kind, files) for kind, files in kinds.items() if files]:
        case []:
            found = f"; {_count(others, 'other file')}{plugin_hint(others)}" if others else ""
            raise _problem(f"received {config.dataset!r}; this folder holds no images{found} ({ALLOWED})")
        case [("images", files)]:
            if others:
                others_listed = _count(others, "file") + plugin_hint(others)
                logger.warning("%s: left out, because their extensions are not of images: %s", root, others_listed)
            if others and len(lists) > len(metadata) and not metadata:
                hint = f"is read only if its name is {' or '.join(METADATA_NAMES)}, or if data.dataset names it"
                logger.warning("%s: a list of labels among these files %s", root, hint)
            splits, roots = _image_folder(root, files, config)
            return SourceFiles("images", splits, roots, metadata)
        case [(kind, files)]:
            return SourceFiles(kind, _splits_of_names(files, root, config))  # type: ignore[arg-type]
        case several:
            found = "; ".join(f"{kind}: {_count(files, 'file')}" for kind, files in several)
            raise _problem(
                f"received {config.dataset!r}; it holds files of several kinds ({found}); "
                "give a pattern or a sub-folder"
            )


def _images_of(file: Path) -> Iterable[Path]:
    """A file itself, or the slices of a volume."""
    try:
        return slices_of(file)
    except Exception as error:  # nibabel raises exceptions of several types
        raise _problem(f"{file} cannot be read: {one_line(error)}; repair or remove it") from error


def _image_folder(
    root: Path, images: Sequence[Path], config: DataConfig
) -> tuple[dict[str, list[Path]], dict[str, Path]]:
    """Images and root of every split."""
    splits: dict[str, list[Path]] = {}
    roots: dict[str, Path] = {}
    for image in images:
        parts = image.relative_to(root).parts
        name = _split_name(parts[0]) if len(parts) > 1 else ""
        splits.setdefault(name, []).append(image)
        roots[name] = root / parts[0]
    named = splits.keys() - {""}
    if not named or not named <= SPLIT_NAMES | {config.train_split, config.validation_split}:
        return {config.train_split: list(images)}, {config.train_split: root}
    if "" in splits:
        beside = _count(splits[""], "image")
        raise _problem(f"{root} holds the splits {sorted(named)}, and {beside} beside them; move them into a split")
    return splits, roots


def _split_name(word: str) -> str:
    """The name of a split: `Train` and `TEST` are `train` and `test`, other words stay as they are."""
    return word.lower() if word.lower() in SPLIT_NAMES else word


def _splits_of_names(files: Sequence[Path], root: Path, config: DataConfig) -> dict[str, list[Path]]:
    """Groups files by the split that their paths below the root name, as in `train-00000.parquet` or
    `data/imagenet_val_003.tar`."""
    known = SPLIT_NAMES | {config.train_split, config.validation_split}
    splits: dict[str, list[Path]] = {}
    for file in files:
        relative = file.relative_to(root).with_suffix("")
        words = [_split_name(word) for part in relative.parts for word in (part, *re.split(r"[-._ 0-9]+", part))]
        splits.setdefault(next((word for word in words if word in known), ""), []).append(file)
    if splits.keys() == {""}:
        return {config.train_split: splits[""]}
    if "" in splits:
        raise _problem(
            f"{_count(splits[''], 'file')} of {config.dataset!r} name no split, others name "
            f"{sorted(splits.keys() - {''})}; name all files after their splits, or give a pattern such as '*.parquet'"
        )
    return splits


def _files_below(folder: Path) -> Iterable[Path]:
    """All files below a folder, sorted by path, without hidden files (`.DS_Store`, `._0001.jpg`) and hidden folders.

    Follows links to folders, except links to a folder that contains the link.
    """
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _leads_back(Path(path, name)))
        yield from (Path(path, name) for name in sorted(names) if not name.startswith("."))


def _leads_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _packed_kind(files: Sequence[Path], name: str) -> PackedKind:
    suffixes = {file.suffix.lower() for file in files}
    kinds = {PACKED.get(suffix) for suffix in suffixes}
    for kind in get_args(PackedKind):
        if kinds == {kind}:
            return kind
    allowed = "files must be all .parquet, all .tar or all lists of images"
    raise _problem(f"received {name!r}; {allowed} ({', '.join(READERS)}), not {', '.join(sorted(suffixes))}")


def _count(files: Sequence[Path], noun: str) -> str:
    shown = ", ".join(file.name for file in files[:5])
    return f"{len(files)} {noun}{'s' * (len(files) > 1)} ({shown}{', …' if len(files) > 5 else ''})"


def _problem(message: str) -> ConfigError:
    return data_problem("dataset", message)
