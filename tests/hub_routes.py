"""The routes of the Hub's HTTP API, for tests/hub_server.py: how each request is answered."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_storage import REGULAR, Account, Blob, Refused, Repository

if TYPE_CHECKING:
    from tests.hub_server import HubServer

PAGE = 10  # entries on one page of a file list
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "openrail", "other", "unknown"}  # some of those of the Hub

Answer = tuple[int, Any, dict[str, str]]


class Handler(BaseHTTPRequestHandler):
    """Each route is a method with its pattern; the groups of the pattern are its arguments."""

    hub: "HubServer"
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # the client was killed
            super().handle()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        path = unquote(url.path)
        self._listen()
        kind = "planted"
        try:
            self.hub.planted(f"{self.command} {path}")
            for kind, method, pattern in ROUTES:
                found = re.fullmatch(pattern, path)
                if self.command in method.split() and found:
                    status, content, headers = getattr(self, f"_{kind}")(*found.groups())
                    break
            else:
                kind = f"no such route: {path}"
                raise Refused(404, "", "no such route")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused), **refused.headers}
            status, content = refused.status, {"error": str(refused)}
        self.hub.answers.append(f"{self.command} {kind} {status}")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
            self._send(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _listen(self) -> None:
        headers = [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "authorization"]
        self.hub.said.append("\n".join([self.path, *headers]).encode())
        if self.command != "PUT":
            self.hub.said.append(self.body)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------ accounts

    @property
    def account(self) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.accounts.get(token)

    def _require_write(self, repo_id: str) -> None:
        if self.account is None:
            raise Refused(401, "", "Invalid username or password.")
        if not self.account.may_write(repo_id.split("/")[0]):
            raise Refused(403, "", "you don't have the rights to write to this repository")

    def _whoami(self) -> Answer:
        account = self.account
        if account is None:
            raise Refused(401, "", "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": account.role}}
        orgs = [{"type": "org", "name": name} for name in account.orgs]
        return 200, {"type": "user", "name": account.name, "orgs": orgs, "auth": auth}, {}

    def _create(self) -> Answer:
        values = json.loads(self.body)
        namespace = values.get("organization") or (self.account.name if self.account else "")
        repo_id = f"{namespace}/{values['name']}"
        self._require_write(repo_id)
        result = {"url": f"{self.hub.address}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return 409, {"error": "You already created this model repo", **result}, {}
        is_private = values.get("visibility") == "private" or bool(values.get("private"))
        repository = self.hub.repositories[repo_id] = Repository(is_private)
        repository.commit("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return 200, result, {}

    def _auth_check(self, repo_id: str, write: str | None) -> Answer:
        self.hub.repository(repo_id, self.account)
        if write:
            self._require_write(repo_id)
        return 200, {}, {}

    def _validate(self) -> Answer:
        """The Hub checks the metadata of a model card."""
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        values = yaml.safe_load(front[1]) if front else {}
        if (chosen := values.get("license")) is not None and chosen not in LICENSES:
            return 400, {"errors": [{"message": f'"license" must be one of {sorted(LICENSES)}'}], "warnings": []}, {}
        for entry in values.get("model-index", []):
            for result in entry["results"]:
                if not {"task", "dataset", "metrics"} <= result.keys():
                    return 400, {"errors": [{"message": '"model-index" is malformed'}], "warnings": []}, {}
        warnings = [] if values else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {"errors": [], "warnings": warnings}, {}

    # ------------------------------------------------------------------ uploads

    def _preupload(self, repo_id: str, revision: str) -> Answer:
        _, present = self.hub.repository(repo_id, self.account).at(revision)
        self._require_write(repo_id)
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "regular" if Path(file["path"]).suffix in REGULAR else "lfs"
            known = {"oid": present[file["path"]].oid} if file["path"] in present else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return 200, {"files": files}, {}

    def _lfs_batch(self, repo_id: str) -> Answer:
        self._require_write(repo_id)
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.stored:
                upload: dict[str, Any] = {"href": f"{self.hub.storage}/{oid}"}
                if size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    parts = {str(n): f"{self.hub.storage}/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {"href": f"{self.hub.address}/complete/{oid}"}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **parts}
                verify = {"href": f"{self.hub.address}/{repo_id}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _store(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "the content has another checksum")
        self.hub.stored[oid] = self.body
        return 200, b"", {}

    def _store_part(self, oid: str, number: str) -> Answer:
        self.hub.add_part(oid, int(number), self.body)
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def _complete(self, oid: str) -> Answer:
        self.body = self.hub.join_parts(oid)
        return self._store(oid)

    def _verify(self, repo_id: str) -> Answer:
        values = json.loads(self.body)
        if len(self.hub.stored.get(values["oid"], b"")) != values["size"]:
            raise Refused(404, "", "the file is not there")
        return 200, {}, {}

    def _commit(self, repo_id: str, revision: str) -> Answer:
        repository = self.hub.repository(repo_id, self.account)
        self._require_write(repo_id)
        _, present = repository.at(revision)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        files = dict(present)
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            if operation["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise Refused(400, "", f"{path}: the file was not uploaded")
                files[path] = Blob(self.hub.stored[value["oid"]], lfs=True)
            elif operation["key"] == "deletedFile":
                if path not in files:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
                del files[path]
        number = repository.commit(header["value"]["summary"], files)
        url = f"{self.hub.address}/{repo_id}/commit/{number}"
        return 200, {"success": True, "commitOid": number, "commitUrl": url}, {}

    # ------------------------------------------------------------------ downloads

    def _info(self, repo_id: str, revision: str | None) -> Answer:
        if repo_id in self.hub.moved:
            return 307, {}, {"Location": self.path.replace(repo_id, self.hub.moved[repo_id])}
        repository = self.hub.repository(repo_id, self.account)
        number, files = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        values = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": number, "private": repository.private}
        return 200, {**values, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}, {}

    def _tree(self, repo_id: str, revision: str, folder: str | None) -> Answer:
        if repo_id in self.hub.moved:
            return 307, {}, {"Location": self.path.replace(repo_id, self.hub.moved[repo_id])}
        _, files = self.hub.repository(repo_id, self.account).at(revision)
        inside = f"{folder}/" if folder else ""
        found = {path: blob for path, blob in sorted(files.items()) if path.startswith(inside)}
        folders = sorted({path[: slash.start()] for path in found for slash in re.finditer("/", path[len(inside) :])})
        if not found and folder:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            found = {path: blob for path, blob in found.items() if "/" not in path[len(inside) :]}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        for path, blob in found.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
            entries.append(entry)
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + PAGE < len(entries):
            rest = f"{urlsplit(self.path).path}?recursive={self.query.get('recursive', 'false')}&cursor={start + PAGE}"
            headers["Link"] = f'<{self.hub.address}{rest}>; rel="next"'
        return 200, entries[start : start + PAGE], headers

    def _resolve(self, repo_id: str, revision: str, path: str) -> Answer:
        if repo_id in self.hub.moved:
            return 307, {}, {"Location": self.path.replace(repo_id, self.hub.moved[repo_id], 1)}
        number, files = self.hub.repository(repo_id, self.account).at(revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": number})
        blob = files[path]
        headers = {"X-Repo-Commit": number, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return self._range(blob.content, headers)
        self.hub.stored.setdefault(blob.oid, blob.content)
        linked = {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return 302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/{blob.oid}"}

    def _download(self, oid: str) -> Answer:
        if oid not in self.hub.stored:
            raise Refused(404)
        return self._range(self.hub.stored[oid], {"ETag": f'"{oid}"'})

    def _range(self, content: bytes, headers: dict[str, str]) -> Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not wanted:
            return 200, content, headers
        start, size = int(wanted[1]), len(content)
        return 206, content[start:], {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}


REPO = r"/([^/]+/[^/]+)"
ROUTES = [  # name of the method, HTTP methods, path
    ("whoami", "GET", "/api/whoami-v2"),
    ("create", "POST", "/api/repos/create"),
    ("validate", "POST", "/api/validate-yaml"),
    ("auth_check", "GET", rf"/api/models{REPO}/auth-check(/write)?"),
    ("preupload", "POST", rf"/api/models{REPO}/preupload/(.+)"),
    ("commit", "POST", rf"/api/models{REPO}/commit/(.+)"),
    ("tree", "GET", rf"/api/models{REPO}/tree/([^/]+)(?:/(.+))?"),
    ("info", "GET", rf"/api/models{REPO}(?:/revision/(.+))?"),
    ("lfs_batch", "POST", rf"{REPO}\.git/info/lfs/objects/batch"),
    ("verify", "POST", rf"{REPO}\.git/info/lfs/objects/verify"),
    ("store_part", "PUT", r"/storage/(\w+)/(\d+)"),
    ("store", "PUT", r"/storage/(\w+)"),
    ("download", "GET HEAD", r"/storage/(\w+)"),
    ("complete", "POST", r"/complete/(\w+)"),
    ("resolve", "GET HEAD", rf"{REPO}/resolve/([^/]+)/(.+)"),
]
