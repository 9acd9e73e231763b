"""What a Hub holds, for tests/hub_server.py: accounts, repositories with their commits, and files."""

import hashlib
from dataclasses import dataclass, field

REGULAR = {".json", ".md", ".py", ".yaml", ".jsonl", ".txt", ".gitattributes"}  # other files go to LFS


@dataclass
class Blob:
    """A file: its content, and whether LFS holds it."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub shows as etag: SHA-256 of an LFS file, git's SHA-1 of another."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """The commits of a repository, oldest first; each as `(id, message, files)`."""

    private: bool
    commits: list[tuple[str, str, dict[str, Blob]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, message: str, files: dict[str, Blob]) -> str:
        number = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((number, message, files))
        return number

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        """Id and files of a commit.

        Raises:
            Refused: there is no such revision.
        """
        revision = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        for number, _, files in self.commits:
            if number == revision:
                return number, files
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code, X-Error-Message, further headers."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


@dataclass
class Account:
    """What a token may do."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.orgs)
