"""A small Hub on loopback: repositories, commits, LFS with checked sizes and SHA-256, refs; and faults on demand.

It supports the requests of `huggingface_hub`, `transformers` and `datasets` for pushing and loading. Everything is
kept in memory. There is one user, "me", whose token is `TOKEN`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_TheTokenOfMe0123456789"
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pkl", ".pt")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    id: str
    title: str
    message: str
    files: dict[str, bytes]
    lfs: set[str]


@dataclass
class Repo:
    kind: str  # "models" or "datasets"
    name: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # newest first
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, message: str, files: dict[str, bytes], lfs: set[str]) -> Commit:
        history = self.branches.setdefault(branch, [])
        content = [self.name, branch, title, message, str(len(history)), *sorted(files)]
        new = Commit(hashlib.sha1("\0".join(content).encode()).hexdigest(), title, message, files, lfs)
        history.insert(0, new)
        return new

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][0]
        wanted = self.tags.get(revision, revision)
        return next((c for history in self.branches.values() for c in history if c.id == wanted), None)


@dataclass
class Fault:
    """A fault for the next `times` requests whose "METHOD path" matches `pattern`.

    `what`: a status to respond with; "cut": the connection ends before the body is read; "lose": the request is
    executed, but the response is lost; "stall": no response until the server ends; "hold": none until `hub.released`.
    """

    pattern: str
    what: int | str
    times: int = 1


class Hub:
    """`with Hub() as hub:` ... `hub.url`, `hub.repos["models", "me/x"]`, `hub.requests`, `hub.faults`.

    Args:
        latency: seconds before each response.
        bandwidth: bytes per second of each connection; `None` for no limit.
    """

    def __init__(self, latency: float = 0.0, bandwidth: float | None = None):
        self.latency, self.bandwidth = latency, bandwidth
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.ended, self.released = threading.Event(), threading.Event()

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set(), self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def add_repo(self, name: str, *, kind: str = "models", private: bool = False, files=None) -> Repo:
        repo = self.repos[kind, name] = Repo(kind, name, private)
        repo.commit(
            "main", "initial commit", "", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, set()
        )
        return repo

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        return self.repos[kind, name].find(revision).files

    def titles(self, name: str, branch: str = "main", kind: str = "models") -> list[str]:
        """The titles of the commits after the first, newest first."""
        return [commit.title for commit in self.repos[kind, name].branches.get(branch, [])[:-1]]

    def environment(self, home) -> dict[str, str]:
        """The environment of a new process with an empty cache whose clients use this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def respond(self) -> None:
        self.reply: tuple[int, dict[str, str], bytes] | None = None
        self.handle_request()
        if self.reply is not None:  # outside the lock, so that a slow response does not block others
            self.send(*self.reply)

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def handle_request(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        line = f"{self.command} {path}"
        with hub.lock:
            hub.requests.append(line)
            fault = next((f for f in hub.faults if f.times and re.search(f.pattern, line)), None)
            if fault:
                fault.times -= 1
        if fault and fault.what in ("stall", "hold"):
            (hub.ended if fault.what == "stall" else hub.released).wait()
        if fault and fault.what in ("stall", "cut"):
            return self.hang_up()
        self.body = self.read_body()
        self.lost = bool(fault and fault.what == "lose")
        if fault and isinstance(fault.what, int):
            return self.answer({"error": "on demand"}, status=fault.what)
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                with hub.lock:
                    return getattr(self, name)(*found.groups())
        return self.error(404, "EntryNotFound", f"no route {line}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def answer(self, content, status: int = 200, **headers: str) -> None:
        if self.lost:
            return self.hang_up()
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.reply = status, {"Content-Type": kind, "Content-Length": str(len(data)), **headers}, data

    def send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        time.sleep(self.hub.latency)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        piece = 1 << 16 if self.hub.bandwidth else max(len(data), 1)
        for start in range(0, len(data), piece):
            self.wfile.write(data[start : start + piece])
            if self.hub.bandwidth:
                time.sleep(len(data[start : start + piece]) / self.hub.bandwidth)

    def error(self, status: int, code: str, text: str) -> None:
        self.answer({"error": text}, status=status, X_Error_Code=code, X_Error_Message=text)

    def may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.error(401, "", "Invalid username or password.")
        return False

    def repo(self, kind: str | None, name: str) -> Repo | None:
        """None: an error has already been sent."""
        repo = self.hub.repos.get((kind or "models", name))
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.error(401 if repo else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def at(self, kind: str | None, name: str, revision: str) -> tuple[Repo, Commit] | None:
        repo = self.repo(kind and kind.strip("/"), name)
        commit = repo and repo.find(revision)
        if repo and not commit:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return (repo, commit) if commit else None

    def create(self) -> None:
        if not self.may_write():
            return
        asked = json.loads(self.body)
        kind, name = asked.get("type", "model") + "s", f"{asked.get('organization') or 'me'}/{asked['name']}"
        address = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repos:
            return self.answer({"error": "You already created this repo", "url": address}, status=409)
        self.hub.add_repo(name, kind=kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer({"url": address, "name": name})

    def validate_yaml(self) -> None:
        """As strict as a reader of the card must be."""
        head = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(head[1]) if head else {}
            assert all(isinstance(data.get(key, []), list) for key in ("tags", "datasets", "metrics", "model-index"))
            errors = []
        except (yaml.YAMLError, AssertionError) as error:
            errors = [{"message": f"metadata: {error}"}]
        self.answer({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        if not self.may_write() or not (found := self.at(kind, name, revision)):
            return
        files = []
        for asked in json.loads(self.body)["files"]:
            path, here = asked["path"], found[1].files.get(asked["path"])
            lfs = path.endswith(LFS_SUFFIXES)
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append(entry | ({} if here is None else {"oid": _oid(here, lfs)}))
        self.answer({"files": files})

    def lfs_batch(self, kind: str | None, name: str) -> None:
        if not self.may_write() or not self.repo(kind and kind.strip("/"), name):
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}?size={asked['size']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            objects.append(asked | ({} if asked["oid"] in self.hub.objects else {"actions": actions}))
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if len(self.body) != int(self.query["size"][0]) or hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "", "size or SHA-256 differ")
        self.hub.objects[oid] = self.body
        self.answer(b"")

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        right = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        self.answer({}, status=200 if right else 404)

    def commit(self, kind: str, name: str, revision: str) -> None:
        if not self.may_write() or not (found := self.at(kind, name, revision)):
            return
        repo, parent = found
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent.id):
            return self.error(412, "", "A commit has happened since. Please refresh and try again.")
        files, lfs = dict(parent.files), set(parent.lfs)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                stored = self.hub.objects.get(value["oid"])
                if stored is None or len(stored) != value["size"]:
                    return self.error(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = stored
                lfs.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        new = repo.commit(revision, header["summary"], header.get("description", ""), files, lfs)
        address = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}/commit/{new.id}"
        self.answer({"success": True, "commitUrl": address, "commitOid": new.id, "hookOutput": ""})

    def branch(self, kind: str, name: str, branch: str) -> None:
        if not self.may_write() or not (repo := self.repo(kind, name)):
            return
        if branch in repo.branches:
            return self.error(409, "", "Reference already exists")
        repo.branches[branch] = [*repo.branches["main"]]
        self.answer({})

    def tag(self, kind: str, name: str, revision: str) -> None:
        if not self.may_write() or not (found := self.at(kind, name, revision)):
            return
        tag = json.loads(self.body)["tag"]
        if tag in found[0].tags:
            return self.error(409, "", "Tag already exists")
        found[0].tags[tag] = found[1].id
        self.answer({})

    def info(self, kind: str, name: str, revision: str | None) -> None:
        if not (found := self.at(kind, name, revision or "main")):
            return
        repo, commit = found
        answer = {"id": name, "sha": commit.id, "private": repo.private, "tags": [], "lastModified": DATE}
        answer |= {"modelId": name} if kind == "models" else {}
        head = re.match(rb"---\n(.*?)\n---", commit.files.get("README.md", b""), re.DOTALL)
        answer |= {"cardData": yaml.safe_load(head[1])} if head else {}
        self.answer(answer | {"siblings": [{"rfilename": path} for path in commit.files]})

    def refs(self, kind: str, name: str) -> None:
        if repo := self.repo(kind, name):
            heads = {branch: history[0].id for branch, history in repo.branches.items()}
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in heads.items()]
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
            self.answer({"branches": branches, "tags": tags, "converts": []})

    def commits(self, kind: str, name: str, revision: str) -> None:
        if repo := self.repo(kind, name):
            same = {"authors": [{"user": "me"}], "date": DATE}
            history = repo.branches[revision]
            self.answer([{"id": c.id, "title": c.title, "message": c.message, **same} for c in history])

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        if not (found := self.at(kind, name, revision)):
            return
        folder = (folder or "").strip("/")
        prefix = f"{folder}/" if folder else ""
        inside = sorted(path for path in found[1].files if path.startswith(prefix))
        if not inside:
            return self.error(404, "EntryNotFound", f"{folder} does not exist")
        everything = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = {}
        for path in inside:
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if everything else min(2, len(parts))):
                above = prefix + "/".join(parts[:depth])
                entries[above] = {"type": "directory", "path": above, "oid": "0" * 40, "size": 0}
            if everything or len(parts) == 1:
                entries[path] = _entry(found[1], path)
        self.answer([*entries.values()])

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        if not (found := self.at(kind, name, revision)):
            return
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        asked = parse_qs(self.body.decode()) if form else json.loads(self.body)
        files, answer = found[1].files, []
        for path in [asked["paths"]] if isinstance(asked["paths"], str) else asked["paths"]:
            if path in files:
                answer.append(_entry(found[1], path))
            elif any(name.startswith(f"{path}/") for name in files):
                answer.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.answer(answer)

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        if not (found := self.at(kind or "models", name, revision)):
            return
        commit = found[1]
        if path not in commit.files:
            return self.error(404, "EntryNotFound", "Entry not found")
        data, lfs = commit.files[path], path in commit.lfs
        etag = f'"{_oid(data, lfs)}"'
        headers = {"X_Repo_Commit": commit.id, "ETag": etag, "Accept_Ranges": "bytes"}
        headers |= {"X_Linked_Etag": etag, "X_Linked_Size": str(len(data))} if lfs else {}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.answer(data, **headers)
        first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(data[first : last + 1], status=206, **headers)


def _oid(data: bytes, lfs: bool) -> str:
    return hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(commit: Commit, path: str) -> dict:
    data = commit.files[path]
    entry = {"type": "file", "path": path, "size": len(data), "oid": _oid(data, False)}
    pointer = {"oid": _oid(data, True), "size": len(data), "pointerSize": 130}
    return entry | ({"lfs": pointer} if path in commit.lfs else {})


_REPO = r"(?:/api/(models|datasets)/([^/]+/[^/]+))"
ROUTES = [  # (methods, path, the handler's method, which gets the groups)
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", _REPO + r"/preupload/(.+)", "preupload"),
    ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(\w+)", "lfs_put"),
    ("POST", r"/lfs-verify", "lfs_verify"),
    ("POST", _REPO + r"/commit/(.+)", "commit"),
    ("POST", _REPO + r"/branch/(.+)", "branch"),
    ("POST", _REPO + r"/tag/(.+)", "tag"),
    ("POST", _REPO + r"/paths-info/(.+)", "paths_info"),
    ("GET", _REPO + r"/refs", "refs"),
    ("GET", _REPO + r"/commits/(.+)", "commits"),
    ("GET", _REPO + r"/tree/([^/]+)(/.*)?", "tree"),
    ("GET", _REPO + r"(?:/revision/(.+))?", "info"),
    ("GET HEAD", r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]
