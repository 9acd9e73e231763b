"""A user whose names and secrets must not reach the Hugging Face Hub."""

import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub_server import HubServer

TOKEN = "hf_" + "Qz7" * 12
USER, HOST = "zsigmondka", "krumplicukor-9"

# An absolute path in a text: / and a name behind no letter, or a Windows drive.
ABSOLUTE = re.compile(r"(?<![\w.:/<*×)\]])/(?:[\w.-]+/)*[\w.-]+|(?<![A-Za-z])[A-Za-z]:\\[\w.-]")


@dataclass(frozen=True)
class Author:
    """A user with the token TOKEN, whose home folder is below `folder`."""

    folder: Path

    home = property(lambda self: self.folder / "sajatgep" / USER)
    words = property(lambda self: [TOKEN, USER, HOST, str(self.folder), self.home.parent.name])

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

    def said(self, hub: HubServer) -> list[str]:
        """What requests told the Hub about the author, besides the files and the login."""
        return [word for word in self.words if any(word.encode() in said for said in hub.said)]

    def traces(self, folder: Path) -> list[tuple[str, str]]:
        """What files say about the author, as `(name of the file, what was found)`."""
        return [
            (path.relative_to(folder).as_posix(), trace)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            for trace in _traces(path, self.words)
        ]


def _traces(path: Path, known: list[str]) -> Iterator[str]:
    content = path.read_bytes()
    yield from (word for word in known if word.encode() in content)
    if path.suffix == ".safetensors":  # the header is text; numbers may look like anything
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    if path.suffix == ".png":  # compressed pixels may look like anything
        return
    yield from ABSOLUTE.findall(content.decode(errors="replace"))


def move_away(hub: HubServer, author: Author, monkeypatch: pytest.MonkeyPatch, to: Path) -> Path:
    """What a stranger has: the uploaded files, in another place. The author's files are gone; returns the new place."""
    shutil.rmtree(author.home)
    hub.save(to, newest=True)
    monkeypatch.setenv("HOME", str(to))
    monkeypatch.delenv("HF_TOKEN")
    return to
