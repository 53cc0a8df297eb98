"""A small Hugging Face hub on this machine: its API, its redirects, and its bad days.

Files above `LFS_BYTES` are redirected to a second server, as the hub does to its CDN. `breaks` says
what goes wrong: see `Hub`.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LFS_BYTES = 1000
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_REFS = re.compile(r"/api/models/([^/]+/[^/]+)/refs")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """commits: hash -> {name: bytes}; refs: branch or tag -> hash."""

    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files, *refs):
        """Adds a commit and moves refs to it; returns its hash."""
        content = repr(sorted(files.items())).encode()
        sha = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(files)
        self.refs |= dict.fromkeys(refs or ("main",), sha)
        return sha


@dataclass
class Hub:
    """Repositories by "owner/name", what was asked for, and what is to go wrong.

    breaks: name of a file -> list of faults, each used once, for the requests of its content:
      "cut:N" closes the connection after N bytes, "wrong" changes a byte, "long" sends more than
      was declared, "no ranges" sends all where a part was asked for, "busy" answers 503.
    lies: name of a file -> headers that replace the true ones in answers to HEAD.
    """

    repos: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    breaks: dict = field(default_factory=dict)
    lies: dict = field(default_factory=dict)
    busy: bool = False
    endpoint: str = ""
    cdn: str = ""

    def repo(self, name="owner/vit", **options):
        return self.repos.setdefault(name, Repo(**options))

    def asked(self, method="GET", part=""):
        return [path for kind, path, _ in self.requests if kind == method and part in path]


def declared(content):
    """(hash, whether it is kept as a large file) as the hub declares it."""
    if len(content) > LFS_BYTES:
        return hashlib.sha256(content).hexdigest(), True
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    timeout = 10

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def send(self, status, content=b"", body=True, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", headers.pop("length", None) or str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, status, code):
        self.send(status, b"{}", self.command == "GET", X_Error_Code=code, X_Error_Message=code)

    def send_json(self, content):
        self.send(200, json.dumps(content).encode(), Content_Type="application/json")

    def answer(self, body):
        path = unquote(self.path.partition("?")[0], errors="strict")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        if self.hub.busy:
            return self.refuse(503, "Busy")
        if path.startswith("/cdn/"):
            _, _, digest, name = path.split("/", 3)
            found = [c for r in self.hub.repos.values() for f in r.commits.values()
                     for c in f.values() if declared(c)[0] == digest]  # fmt: skip
            return self.send_content(name, found[0], body)
        raw = self.path.partition("?")[0]
        for pattern, action in ((_REFS, self.refs), (_API, self.info), (_RESOLVE, self.resolve)):
            found = pattern.fullmatch(raw)
            if found:
                return action(*(part and unquote(part) for part in found.groups()))
        return self.refuse(404, "NotFound")

    def repo(self, name):
        repo = self.hub.repos.get(name)
        if repo is None:
            self.refuse(401, "RepoNotFound")
        elif repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            self.refuse(401, "RepoNotFound")
        else:
            return repo

    def refs(self, name):
        repo = self.repo(name)
        if repo:
            refs = [{"name": n, "ref": n, "targetCommit": sha} for n, sha in repo.refs.items()]
            self.send_json({"branches": refs, "tags": [], "converts": []})

    def info(self, name, revision):
        repo = self.repo(name)
        if not repo:
            return
        sha = repo.refs.get(revision or "main", revision)
        if sha not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in repo.commits[sha]]
        self.send_json({"id": name, "modelId": name, "sha": sha, "siblings": siblings})

    def resolve(self, repo_name, revision, name):
        repo = self.repo(repo_name)
        if not repo:
            return
        if repo.gated:
            return self.refuse(403, "GatedRepo")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        if name not in repo.commits[sha]:
            return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = repo.commits[sha][name]
        digest, large = declared(content)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{digest}"'}
        if large:
            signed = f"{self.hub.cdn}/cdn/{digest}/{name}?Signature=secret"
            headers |= {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": len(content)}
            headers |= {"Location": signed, "ETag": '"other"'}
        headers |= self.hub.lies.get(name, {})
        if large:
            return self.send(302, b"", **headers)
        if self.command == "HEAD":
            return self.send(200, b"", body=False, length=len(content), **headers)
        self.send_content(name, content, True)

    def send_content(self, name, content, body):
        faults = self.hub.breaks.get(name, [])
        fault = faults.pop(0) if faults and body else ""
        if fault == "busy":
            return self.refuse(503, "Busy")
        status, start, headers = 200, 0, {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and fault != "no ranges":
            start, status = int(asked[1]), 206
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        if fault == "wrong":
            part = part[:-1] + bytes([part[-1] ^ 1])
        if fault == "long":
            self.send(200, b"", body=False, length=len(part) + 4096)
            self.wfile.write(part + b"x" * 4096)
            return
        if fault.startswith("cut:"):
            self.send(status, b"", body=False, length=len(part), **headers)
            self.wfile.write(part[: int(fault[4:])])
            self.wfile.flush()
            self.close_connection = True
            return
        self.send(status, part, body, **headers)


class Server:
    """Runs a hub on two ports until `close`."""

    def __init__(self):
        self.hub = Hub()
        handler = type("HubHandler", (Handler,), {"hub": self.hub})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        hub, cdn = (server.server_port for server in self.servers)
        # Of another host by name, so that huggingface_hub takes it for a stranger.
        self.hub.endpoint, self.hub.cdn = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()
