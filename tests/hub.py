"""A hub on this machine: what huggingface.co answers when `huggingface_hub` fetches a model, and
what it answers when something is wrong.

    with Hub() as hub:
        hub.add("org/name", {"config.json": b"{}", "model.safetensors": data})
        ...  # with HF_ENDPOINT=hub.url

The answers follow the hub's own: the model's commit, the list of its files with their checksums,
and for every file a HEAD and a GET under /resolve/, where large files (here: *.safetensors)
redirect to a store that understands `Range`."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    files: dict  # path: bytes
    gated: bool = False  # files need the token "good"
    missing: set = field(default_factory=set)  # listed, but not there
    corrupt: set = field(default_factory=set)  # served with one bit flipped
    drops: dict = field(default_factory=dict)  # path: how many times the connection breaks halfway

    @property
    def commit(self):
        return hashlib.sha1("".join(sorted(self.files)).encode()).hexdigest()


def is_large(path):
    return path.endswith(".safetensors")


def etag(path, data):
    "Large files are known by their sha256, the others by git's hash."
    return (
        hashlib.sha256(data).hexdigest()
        if is_large(path)
        else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.handle_request()

    def do_HEAD(self):
        self.handle_request()

    def handle_request(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path, self.headers.get("Range")))
        if hub.status:
            return self.answer(hub.status)
        if hub.page is not None:
            return self.answer(200, hub.page, {"Content-Type": "text/html"})
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/[^/]+)?", path):
            return self.info(m[1])
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self.tree(m[1])
        if m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(m[1], m[3])
        if m := re.fullmatch(r"/store/([^/]+/[^/]+)/(.+)", path):
            return self.store(m[1], m[2])
        self.error(404, "RepoNotFound", "Repository not found")

    def repo(self, name):
        repo = self.server.hub.repos.get(name)
        if repo is None:
            self.error(
                401, "RepoNotFound", "Invalid username or password."
            )  # so says the hub to strangers
        return repo

    def info(self, name):
        if repo := self.repo(name):
            self.json(
                {
                    "_id": "0",
                    "id": name,
                    "modelId": name,
                    "sha": repo.commit,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "gated": "manual" if repo.gated else False,
                    "siblings": [{"rfilename": f} for f in repo.files],
                }
            )

    def tree(self, name):
        if repo := self.repo(name):
            self.json([self.entry(f, data) for f, data in repo.files.items()])

    def entry(self, path, data):
        entry = {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        }
        return entry | (
            {"lfs": {"oid": etag(path, data), "size": len(data), "pointerSize": 134}}
            if is_large(path)
            else {}
        )

    def resolve(self, name, path):
        if not (repo := self.repo(name)):
            return
        if path not in repo.files or path in repo.missing:
            return self.error(404, "EntryNotFound", "Entry not found", repo)
        if repo.gated and self.headers.get("Authorization") != "Bearer good":
            return self.error(403, "GatedRepo", "Access to this model is restricted.", repo)
        if not is_large(path):
            return self.content(repo, path)
        data = repo.files[path]
        self.answer(
            302,
            headers={
                "Location": f"{self.server.hub.url}/store/{name}/{path}",
                "X-Repo-Commit": repo.commit,
                "X-Linked-Etag": f'"{etag(path, data)}"',
                "X-Linked-Size": str(len(data)),
            },
        )

    def store(self, name, path):
        if repo := self.repo(name):
            self.content(repo, path)

    def content(self, repo, path):
        data, first = repo.files[path], 0
        headers = {
            "ETag": f'"{etag(path, data)}"',
            "X-Repo-Commit": repo.commit,
            "Accept-Ranges": "bytes",
        }
        if path in repo.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first = int(m[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        drop = self.command == "GET" and repo.drops.get(path, 0) > 0
        if drop:
            repo.drops[path] -= 1
        self.answer(206 if first else 200, data[first:], headers, drop)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status, code, message, repo=None):
        self.answer(
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message}
            | ({"X-Repo-Commit": repo.commit} if repo else {}),
        )

    def answer(self, status, body=b"", headers=(), drop=False):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if drop else body)
        if drop:
            self.close_connection = True
            self.wfile.flush()


class Hub:
    def __init__(self):
        self.repos, self.log, self.status, self.page = {}, [], None, None

    def add(self, name, files, **faults):
        self.repos[name] = Repo(dict(files), **faults)
        return self.repos[name]

    def fetched(self):
        "The files whose content was asked for since the last time, by name."
        seen = [
            path.rsplit("/", 1)[1]
            for command, path, _ in self.log
            if command == "GET"
            and ("/store/" in path or "/resolve/" in path)
            and not (path.endswith(".safetensors") and "/resolve/" in path)
        ]
        self.log.clear()
        return sorted(seen)

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(
            target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
        ).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
