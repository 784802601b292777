"""A Hub for tests: the part of its upload protocol that huggingface_hub's client speaks, on 127.0.0.1, held in memory.

Written from what the client sends and reads. It checks the bearer token, sizes and sha256, and fails as it is told to.
Large files travel by Git LFS ("basic" transfer), or by Xet into a local store of hf_xet's own, without its network protocol.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".pth", ".bin")  # what a new repo's .gitattributes gives to LFS
SIGNATURE = "Signature=not-for-logs"  # of the address that a blob is sent to, as a store's presigned URLs have it


@dataclass(kw_only=True)
class Repo:
    private: bool
    commits: dict[str, dict[str, dict]] = field(default_factory=dict)
    """Commit -> path -> {"size", "oid", "large", "content"}."""
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    def commit(self, branch: str, files: dict[str, dict]) -> str:
        before = self.branches.get(branch)
        oid = hashlib.sha1(f"{before} {sorted((path, file['oid']) for path, file in files.items())}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid


@dataclass(kw_only=True)
class Failure:
    method: str
    where: str
    times: int
    status: int | None = None
    """This answer, and nothing done."""
    drop_after_bytes: int | None = None
    """The line is lost in the middle of the body."""
    silent_s: float = 0.0
    """The line is lost after a silence, and nothing done."""
    lose_answer: bool = False
    """All is done, and the line lost before the answer."""


class Hub:
    """`with Hub(user, token) as hub`: hub.url answers; hub.requests counts "METHOD /path"; hub.fail() spoils what comes."""

    def __init__(self, user: str, token: str, xet_store: str | None = None):
        self.user, self.token, self.xet_store = user, token, xet_store
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: Counter = Counter()
        self.failures: list[Failure] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Answer,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, *, private: bool, **files: bytes) -> Repo:
        repo = self.repos[name] = Repo(private=private)
        attributes = "".join(f"*{suffix} filter=lfs\n" for suffix in LARGE).encode()
        repo.commit("main", {path: small(content) for path, content in {".gitattributes": attributes, **files}.items()})
        return repo

    def fail(self, method, where, *, times=1, **how):
        """The next `times` requests of this method whose path holds `where` go wrong as a Failure says."""
        self.failures.append(Failure(method=method, where=where, times=times, **how))

    def due(self, method: str, path: str) -> Failure | None:
        with self.lock:
            self.requests[f"{method} {path}"] += 1
            for failure in self.failures:
                if failure.times and failure.method == method and failure.where in path:
                    failure.times -= 1
                    return failure

    def count(self, method: str, where: str = "") -> int:
        return sum(n for request, n in self.requests.items() if request.startswith(f"{method} ") and where in request)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, but for the .gitattributes that every repo is born with."""
        repo = self.repos[name]
        files = repo.commits[repo.resolve(revision)]
        return {path: file["content"] for path, file in sorted(files.items()) if path != ".gitattributes"}


def small(content: bytes) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # git's own name of these bytes
    return {"size": len(content), "oid": oid, "large": False, "content": content}


class Refused(Exception):
    pass


class Answer(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's delayed ACK

    def log_message(self, *_):
        pass

    def answer(self):
        path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        failure = self.hub.due(self.command, path)
        length = int(self.headers.get("Content-Length", 0))
        if failure and failure.drop_after_bytes is not None:
            self.rfile.read(min(length, failure.drop_after_bytes))
            return self.hang_up()
        body = self.rfile.read(length)
        if failure and failure.silent_s:
            self.hub.closing.wait(failure.silent_s)
            return self.hang_up()
        try:
            if failure and failure.status:
                raise Refused(failure.status, f"told to fail {failure.status} for {self.headers.get('Authorization')}")
            if path.startswith("/blobs/"):
                status, content = 200, self.put_blob(path, query, body)
            else:
                if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                    raise Refused(401, "Invalid username or password.")
                with self.hub.lock:
                    status, content = self.route(path, query, body)
        except Refused as refused:
            status, content = refused.args[0], {"error": refused.args[1]}
        if failure and failure.lose_answer:
            return self.hang_up()
        text = json.dumps(content).encode()
        kind = "application/json"
        if status == 502:  # comes from the gateway, which does not speak JSON
            text, kind = b"<html>Bad gateway</html>", "text/html"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        if kind == "application/json" and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def hang_up(self):
        self.close_connection = True
        with suppress(OSError):  # the client may have given up first
            self.connection.shutdown(socket.SHUT_RDWR)

    def put_blob(self, path: str, query: str, body: bytes) -> dict:
        oid, size = re.fullmatch(r"/blobs/(\w+)/(\d+)", path).groups()
        if query != SIGNATURE:
            raise Refused(403, "the address is not signed")
        if len(body) != int(size) or hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, f"{len(body)} bytes came, which are not {oid} of {size} bytes")
        self.hub.blobs[oid] = body
        return {}

    def route(self, path: str, query: str, body: bytes) -> tuple[int, dict]:
        if path == "/api/repos/create":
            return self.create_repo(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate_card(json.loads(body)["content"])
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info/lfs/objects)?(?:/([\w-]+)(?:/(.+))?)?", path)
        if not found or found[1] not in self.hub.repos:
            raise Refused(404, "Repository not found")
        name, what, argument = found.groups()
        repo = self.hub.repos[name]
        commit = repo.resolve(argument if argument and what not in ("branch", "tag") else "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {argument}")
        match self.command, what:
            case "GET", None | "revision":
                return 200, self.model_info(name, commit, "blobs" in query)
            case "GET", "refs":
                named = {"branches": repo.branches, "tags": repo.tags}
                return 200, {"converts": []} | {
                    kind: [{"name": n, "ref": n, "targetCommit": oid} for n, oid in refs.items()]
                    for kind, refs in named.items()
                }
            case "GET", "xet-write-token":
                return 200, {"casUrl": f"local://{self.hub.xet_store}", "accessToken": "xet", "exp": int(time.time()) + 3600}
            case "POST", "preupload":
                return 200, {"files": [self.upload_mode(repo.commits[commit], f["path"]) for f in json.loads(body)["files"]]}
            case "POST", "batch":
                return 200, self.lfs_batch(name, json.loads(body)["objects"])
            case "POST", "verify":
                sent = json.loads(body)
                if len(self.hub.blobs.get(sent["oid"], b"")) != sent["size"]:
                    raise Refused(404, "no such blob")
                return 200, {}
            case "POST", "commit":
                oid = self.commit(repo, argument, [json.loads(line) for line in body.splitlines()])
                return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
            case "POST", "branch" | "tag":
                return self.name_commit(repo, what, argument, json.loads(body))
            case "DELETE", "tag" if argument in repo.tags:
                del repo.tags[argument]
                return 200, {}
        raise Refused(404, f"this Hub knows no {self.command} {path}")

    def create_repo(self, wanted: dict) -> tuple[int, dict]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != self.hub.user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {wanted['organization']!r}")
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
        self.hub.create(name, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        return 200, {"url": f"{self.hub.url}/{name}"}

    def validate_card(self, text: str) -> tuple[int, dict]:
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            if front and isinstance(yaml.safe_load(front[1]), dict):
                return 200, {"errors": [], "warnings": []}
            problem = "empty or missing yaml metadata"
        except yaml.YAMLError as error:
            problem = str(error)
        return 400, {"errors": [{"message": problem}], "warnings": []}

    def model_info(self, name: str, commit: str, with_sizes: bool) -> dict:
        repo = self.hub.repos[name]
        siblings = [
            {"rfilename": path} | ({"size": file["size"], "blobId": file["oid"]} if with_sizes else {})
            for path, file in repo.commits[commit].items()
        ]
        known = {"_id": "1", "id": name, "modelId": name, "private": repo.private, "disabled": False, "gated": False}
        return known | {"sha": commit, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "xetEnabled": False}

    def upload_mode(self, files: dict[str, dict], path: str) -> dict:
        ignored = files.get(".gitignore", {"content": b""})["content"].decode().splitlines()
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
            "shouldIgnore": any(fnmatch(path, pattern) for pattern in ignored),
            "oid": files.get(path, {}).get("oid"),
        }

    def lfs_batch(self, name: str, objects: list[dict]) -> dict:
        for wanted in objects:
            if wanted["oid"] not in self.hub.blobs:
                blob = f"{self.hub.url}/blobs/{wanted['oid']}/{wanted['size']}?{SIGNATURE}"
                verify = f"{self.hub.url}/{name}.git/info/lfs/objects/verify"
                wanted["actions"] = {"upload": {"href": blob}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo: Repo, branch: str, lines: list[dict]) -> str:
        files = dict(repo.commits[repo.branches[branch]])
        for kind, value in [(line["key"], line["value"]) for line in lines]:
            if kind == "file":
                files[value["path"]] = small(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                content = self.hub.blobs.get(value["oid"])
                if self.hub.xet_store is None and (content is None or len(content) != value["size"]):
                    raise Refused(400, f"{value['path']}: its blob was never uploaded")
                files[value["path"]] = {"size": value["size"], "oid": value["oid"], "large": True, "content": content}
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, f"{value['path']}: A file with this name doesn't exist")
        return repo.commit(branch, files)

    def name_commit(self, repo: Repo, what: str, argument: str, wanted: dict) -> tuple[int, dict]:
        names = repo.branches if what == "branch" else repo.tags
        name = argument if what == "branch" else wanted["tag"]
        commit = repo.resolve(wanted.get("startingPoint", "main") if what == "branch" else argument)
        if name in names:
            return 409, {"error": f"{what} {name} already exists"}
        if commit is None:
            raise Refused(404, "Invalid rev id")
        names[name] = commit
        return 200, {}
