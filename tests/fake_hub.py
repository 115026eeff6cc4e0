"""A small Hugging Face Hub over real HTTP: what the client calls to list, download, create and commit.

Model repositories with branches, commits, gating and a write token; large files go the way the real Hub sends them
(LFS: a redirect with a linked ETag on download, batch, PUT and verify on upload). Shares no code with the packages.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import yaml

TOKEN = "hf_fake_write_token"


class Repository:
    def __init__(self, gated: bool = False, private: bool = False):
        self.gated, self.private = gated, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit({})

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """The branch's files with `files` put in; the new commit's id."""
        tree = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        oid = hashlib.sha1(repr((sorted(tree.items()), branch, len(self.commits))).encode()).hexdigest()
        self.commits[oid] = tree
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class FakeHub:
    """`with FakeHub() as hub:` serves `hub.repositories` at `hub.endpoint`; `hub.log` is what was asked."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.log: list[str] = []
        self.large: dict[str, bytes] = {}  # LFS objects by their SHA-256
        self.broken = False  # answer everything with 500
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()


def set_offline(monkeypatch, offline: bool) -> None:
    """Switch the client's offline mode."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    # huggingface_hub 0.x decides when it opens a session.
    getattr(huggingface_hub.utils._http, "reset_sessions", lambda: None)()


@contextmanager
def reachable_hub(monkeypatch, folder: Path) -> Iterator[FakeHub]:
    """A Hub that the client of this process talks to, with an empty cache in `folder` and no login."""
    constants = huggingface_hub.constants
    with FakeHub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # huggingface_hub 0.x keeps a copy of its own.
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        set_offline(monkeypatch, False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not HTTP of the Hub's own
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        if isinstance(body, dict | list):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self) -> None:
        path = urlsplit(self.path).path  # quoted: a revision may hold a slash
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append(f"{self.command} {unquote(path)}")
        if self.hub.broken:
            return self.answer(500, {"error": "broken"})
        routes = [
            (r"GET /api/models/(\w[\w.-]*/[\w.-]+)(?:/revision/(.+))?", self.info),
            (r"GET /api/models/(\w[\w.-]*/[\w.-]+)/tree/([^/]+)", self.listing),
            (r"(?:GET|HEAD) /(\w[\w.-]*/[\w.-]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"(?:GET|HEAD) /objects/(\w+)", self.object),
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", self.validate),
            (r"POST /api/models/(\w[\w.-]*/[\w.-]+)/preupload/(.+)", self.preupload),
            (r"POST /(\w[\w.-]*/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            (r"PUT /upload/(\w+)", self.put),
            (r"POST /verify", self.verify),
            (r"POST /api/models/(\w[\w.-]*/[\w.-]+)/commit/(.+)", self.commit),
        ]
        for pattern, act in routes:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return act(*(group and unquote(group) for group in match.groups()))
        self.answer(404, {"error": f"no route {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def readable(self, name: str) -> Repository | None:
        """The repository, or the refusal that the real Hub gives."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.may_write()):
            self.refuse(404 if self.may_write() else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.readable(name)
        if repository is None:
            return None
        oid = repository.resolve(revision)
        if oid is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return oid, repository.commits[oid]

    def info(self, name: str, revision: str | None) -> None:
        found = self.tree(name, revision or "main")
        if found:
            oid, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.answer(200, {"id": name, "modelId": name, "sha": oid, "siblings": siblings, "tags": []})

    def listing(self, name: str, revision: str) -> None:
        """Every file with its size and its hash, which for a large one is its SHA-256."""
        found = self.tree(name, revision)
        if not found:
            return
        entries = []
        for path, content in sorted(found[1].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if is_large(path):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 100}
            entries.append(entry)
        self.answer(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.tree(name, revision)
        if not found:
            return
        oid, files = found
        if self.hub.repositories[name].gated and not self.may_write():
            return self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        if path not in files:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        content = files[path]
        if is_large(path):
            digest = hashlib.sha256(content).hexdigest()
            self.hub.large[digest] = content
            # Another host, as the real Hub's: the client follows redirects within the Hub when it asks for headers.
            elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
            size, location = str(len(content)), f"{elsewhere}/objects/{digest}"
            self.answer(
                302, b"", Location=location, X_Linked_Etag=f'"{digest}"', X_Linked_Size=size, X_Repo_Commit=oid
            )
        else:
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=oid)

    def object(self, digest: str) -> None:
        self.answer(200, self.hub.large[digest], ETag=f'"{digest}"')

    def create(self) -> None:
        if not self.may_write():
            return self.refuse(401, "", "Invalid username or password.")
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "forbidden":
            return self.refuse(403, "", "You don't have the rights to create a model under the namespace")
        reply = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repositories:
            return self.answer(409, reply, X_Error_Message="You already created this model repo")
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=private)
        self.answer(200, reply)

    def validate(self) -> None:
        """The real rules, as far as they concern a model card: YAML, and a base_model that names a repository."""
        text = json.loads(self.body)["content"]
        header = yaml.safe_load(text.split("---\n")[1])
        errors = []
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", header.get("base_model", "a/b")):
            errors.append({"message": '"base_model" must be a repository'})
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self.tree(name, revision) is None:
            return
        files = json.loads(self.body)["files"]
        mode = {True: "lfs", False: "regular"}
        answers = [{"path": f["path"], "uploadMode": mode[is_large(f["path"])], "shouldIgnore": False} for f in files]
        self.answer(200, {"files": answers})

    def batch(self, name: str) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            upload, verify = f"{self.hub.endpoint}/upload/{one['oid']}", f"{self.hub.endpoint}/verify"
            objects.append({**one, "actions": {"upload": {"href": upload}, "verify": {"href": verify}}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.hub.large[digest] = self.body
        self.answer(200)

    def verify(self) -> None:
        asked = json.loads(self.body)
        self.answer(200 if len(self.hub.large.get(asked["oid"], b"")) == asked["size"] else 422, {})

    def commit(self, name: str, revision: str) -> None:
        if not self.may_write():
            return self.refuse(403, "", "no write access")
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = self.hub.repositories[name].commit(files, revision)
        self.answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})
