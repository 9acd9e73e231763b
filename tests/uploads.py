"""A folder in place of the Hugging Face Hub, and a user whose names and secrets must not reach it."""

import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

TOKEN = "hf_" + "Qz7" * 12
USER, HOST = "zsigmondka", "krumplicukor-9"

# An absolute path in a text: / and a name behind no letter, or a Windows drive.
ABSOLUTE = re.compile(r"(?<![\w.:/<*×)\]])/(?:[\w.-]+/)*[\w.-]+|(?<![A-Za-z])[A-Za-z]:\\[\w.-]")


class Hub:
    """Stores uploads in `root/user/name`, as HfApi would on the Hub."""

    def __init__(self, root: Path):
        self.root = root

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **options: SimpleNamespace(repo_id=name))
        monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: self.upload_folder(**options))
        monkeypatch.setattr(HfApi, "create_commit", lambda api, **options: self.create_commit(**options))

    def upload_folder(
        self,
        repo_id: str,
        folder_path: str | Path,
        ignore_patterns: list[str] | None = None,
        delete_patterns: list[str] | None = None,
        **options: Any,
    ) -> str:
        for name in filter_repo_objects(self.names(repo_id), allow_patterns=delete_patterns or []):
            (self.root / repo_id / name).unlink()
        for name in filter_repo_objects(names_in(Path(folder_path)), ignore_patterns=ignore_patterns):
            self._add(repo_id, name, (Path(folder_path) / name).read_bytes())
        return f"hub/{repo_id}"

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                self._add(repo_id, operation.path_in_repo, file.read())
        return f"hub/{repo_id}"

    def names(self, repo_id: str) -> list[str]:
        """The files of a repository."""
        return names_in(self.root / repo_id)

    def _add(self, repo_id: str, name: str, content: bytes) -> None:
        path = self.root / repo_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Author:
    """A user with the token TOKEN, whose home folder is below `folder`."""

    folder: Path

    home = property(lambda self: self.folder / "sajatgep" / USER)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home.mkdir(parents=True)
        for name, value in {"HOME": self.home, "USER": USER, "LOGNAME": USER, "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(socket, "gethostname", lambda: HOST)

    def clutter(self, run: Path) -> None:
        """Adds to the folder of a run what jobs and users leave in such folders."""
        for name in ("notes.txt", ".env", "id_rsa", "secret.py", "my.safetensors", "training_args.bin", ".holder.json"):
            (run / name).write_text(f"{USER}@{HOST} {TOKEN}\n")
        for name in ("skipped_images.jsonl", "events.out.tfevents.0", "checkpoint-7/config.json", "logs/model_x.py"):
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text(f'{{"name": "{self.home}/cats/1.png"}}\n')
        (self.home / "outside.txt").write_text(TOKEN)
        (run / "linked.txt").symlink_to(self.home / "outside.txt")
        (run / "linked").symlink_to(self.home)

    def traces(self, folder: Path) -> list[tuple[str, str]]:
        """What files say about the author, as `(name of the file, what was found)`."""
        known = [TOKEN, USER, HOST, str(self.folder), self.home.parent.name]
        return [
            (path.relative_to(folder).as_posix(), trace)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            for trace in _traces(path, known)
        ]


def _traces(path: Path, known: list[str]) -> Iterator[str]:
    content = path.read_bytes()
    yield from (word for word in known if word.encode() in content)
    if path.suffix == ".safetensors":  # the header is text; numbers may look like anything
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    yield from ABSOLUTE.findall(content.decode(errors="replace"))


def move_away(hub: Hub, author: Author, monkeypatch: pytest.MonkeyPatch, to: Path) -> Path:
    """What a stranger has: the uploaded files, in another place. The author's files are gone; returns the new place."""
    shutil.rmtree(author.home)
    shutil.move(hub.root, to)
    monkeypatch.setenv("HOME", str(to))
    monkeypatch.delenv("HF_TOKEN")
    return to
