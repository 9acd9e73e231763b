"""A Hugging Face Hub on this machine: the part of its HTTP API that uploads and downloads of huggingface_hub use.

It answers whoami, repository creation, write checks, checks of model cards, preupload, LFS (in one piece or in parts),
commits, repository information, file lists, and downloads with redirects, etags and revisions. Errors have the status
codes and headers of the Hub. It has no Xet storage: clients need HF_HUB_DISABLE_XET.

    with HubServer() as hub:
        hub.use(monkeypatch)         # this process
        hub.environment(home)        # other processes
        hub.files("me/model")        # {path: content} at the newest commit
"""

import re
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.hub_routes import Handler
from tests.hub_storage import REGULAR, Account, Blob, Refused, Repository

__all__ = ["Account", "HubServer"]


class HubServer:
    """The server, in a thread of this process.

    Attributes:
        token: a token that may write.
        accounts: by the tokens that it knows.
        repositories: by name.
        said: what clients have sent besides files: paths, headers but Authorization, and bodies.
        answers: every request as "METHOD route status".
        part_size: files above this size are uploaded in parts of it.
        before: called with "METHOD path" before a request is handled.
    """

    def __init__(self, token: str = "hf_" + "t" * 30, name: str = "me"):
        self.token, self.accounts = token, {token: Account(name)}
        self.repositories: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        self.stored: dict[str, bytes] = {}
        self.said: list[bytes] = []
        self.answers: list[str] = []
        self.part_size = 2**20
        self.before: Callable[[str], None] = lambda request: None
        self._failures: list[tuple[str, Refused]] = []
        self._parts: dict[str, dict[int, bytes]] = {}
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}/storage"  # another host, as on the Hub

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------ for tests

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lets huggingface_hub in this process speak to the server."""
        import transformers.utils.hub
        from huggingface_hub import constants, hf_api

        for name, value in {
            "ENDPOINT": self.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.address)
        monkeypatch.setattr(
            transformers.utils.hub, "_hf_api", None, raising=False
        )  # made with the address at first use
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables of another process, whose caches are empty folders in `home`."""
        variables = {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return variables | {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def fail(self, pattern: str, status: int, code: str = "", times: int = 1, **headers: str) -> None:
        """Lets the next requests whose `METHOD path` matches fail."""
        self._failures += [(pattern, Refused(status, code, "planted", **headers))] * times

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files of the newest commit."""
        if repo_id not in self.repositories:
            return {}
        _, files = self.repositories[repo_id].at("main")
        return {path: blob.content for path, blob in sorted(files.items()) if path != ".gitattributes"}

    def names(self, repo_id: str) -> list[str]:
        """The paths of the newest commit."""
        return list(self.files(repo_id))

    def add(self, repo_id: str, files: dict[str, bytes], message: str = "earlier") -> str:
        """Adds a commit with these files to a repository; returns its id."""
        repository = self.repositories.setdefault(repo_id, Repository(private=False))
        blobs = {path: Blob(content, Path(path).suffix not in REGULAR) for path, content in files.items()}
        return repository.commit(message, blobs)

    def save(self, folder: Path, newest: bool = False) -> Path:
        """Writes the files of all commits into a folder, as `repository/commit/path`; or of the newest, without it."""
        for name, repository in self.repositories.items():
            for number, _, files in repository.commits[-1:] if newest else repository.commits:
                for path, blob in files.items():
                    target = folder / name / ("" if newest else number) / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(blob.content)
        return folder

    # ------------------------------------------------------------------ used by the handler

    def planted(self, request: str) -> None:
        self.before(request)
        for index, (pattern, failure) in enumerate(self._failures):
            if re.search(pattern, request):
                del self._failures[index]
                raise failure

    def repository(self, name: str, account: Account | None) -> Repository:
        if name not in self.repositories:
            raise Refused(404 if account else 401, "RepoNotFound", "Repository not found")
        repository = self.repositories[name]
        if repository.private and (account is None or name.split("/")[0] not in (account.name, *account.orgs)):
            raise Refused(404 if account else 401, "RepoNotFound", "Repository not found")
        return repository

    def add_part(self, oid: str, number: int, content: bytes) -> None:
        self._parts.setdefault(oid, {})[number] = content

    def join_parts(self, oid: str) -> bytes:
        parts = self._parts.pop(oid)
        return b"".join(parts[number] for number in sorted(parts))
