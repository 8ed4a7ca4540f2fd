"""A small Hugging Face Hub on 127.0.0.1: the real protocol for the real clients, and faults.

It answers what huggingface_hub, transformers and peft ask for to commit, tag and download files of
a model repository, and keeps commits and blobs on disk. Like the Hub it refuses bad tokens, foreign
namespaces, bad paths, wrong checksums, dangling LFS pointers and stale parent commits. Not covered:
Xet (but for one whose storage fails), git, pull requests, multi-part LFS, paging.

    with HubServer(folder) as hub:
        hub.create(REPO)
        hub.fault("PUT /_lfs/", reset_after=100_000)  # break one upload
        subprocess.run(command, env={**os.environ, **hub.environment(OWNER, home)})
"""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import yaml  # a dependency of huggingface_hub

REPO, OWNER = (
    "elith/llm-book-models",
    "hf_" + "OwnersSecret" * 3,
)  # in the tests; a token that looks like one
TOKENS = {
    OWNER: "ada+elith",
    "hf_reader": "bob:read",
    "hf_other": "mallory",
}  # namespaces; :read only reads
LFS_SUFFIXES = (
    "bin",
    "ckpt",
    "model",
    "npz",
    "parquet",
    "pkl",
    "png",
    "pt",
    "pth",
    "safetensors",
    "zip",
)
LFS_MIN_SIZE = 10_000_000  # bytes: larger files are LFS whatever their name
CHUNK = 1 << 16
NAME = r"[A-Za-z0-9_](?:(?!--|\.\.)[\w.-])*"
ID, REVISION, SHA = f"({NAME}/{NAME})", "([^/]+)", "([0-9a-f]{64})"
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def route(method: str, pattern: str) -> Callable[..., Any]:
    return lambda function: ROUTES.append((method, re.compile(pattern), function)) or function


def clean_path(path: str) -> str:
    if "\\" in path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path in repo: {path!r}")
    return path


def speak_to(server: "HubServer", home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process and those it starts clients of the server, with a cache below `home`."""
    import transformers.utils.hub
    from huggingface_hub import constants, hf_api

    for name, value in server.environment(OWNER, home).items():
        monkeypatch.setenv(name, value)
    # The libraries have read their variables long ago.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (
        "huggingface_hub.utils._http",
        "huggingface_hub.file_download",
        "finetuning.hub.client",
    ):
        monkeypatch.setattr(f"{module}.time", impatient)


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}


class HubServer(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(
        self, root: Path, address: str = "127.0.0.1", other_name: str = "localhost"
    ) -> None:
        super().__init__((address, 0), Handler)
        self.blobs, self.models = root / "blobs", root / "models"
        self.tokens, self.cards = (
            dict(TOKENS),
            {},
        )  # cards: metadata of models and data sets that are only asked about
        self.requests, self.faults = (
            [],
            [],
        )  # a request: method, path, status ("cut" if none), auth (a token was sent)
        self.promises_xet = False  # large files then come by Xet, whose storage is not there
        self.lock, self.secret = threading.RLock(), secrets.token_bytes(16)
        self.url = f"http://{address}:{self.server_address[1]}"
        self.cdn = self.url.replace(address, other_name)  # another origin, like the real CDN
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()

    def handle_error(self, request: Any, address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that left is none of ours
            super().handle_error(request, address)

    def environment(self, token: str | None, home: Path) -> dict[str, str]:
        """Variables for a client process; `home` becomes its HF_HOME."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # the client does not ask whether a server knows Xet
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": ",".join(url.split(":")[1].strip("/") for url in (self.url, self.cdn)),
        }

    def fault(self, match: str, times: int = 1, skip: int = 0, **what: Any) -> None:
        """Disturbs `times` requests whose "METHOD /path" contains `match`, after `skip` of them.

        what: status=503 [headers={"Retry-After": "1"}]; delay=seconds before any work;
        drop_response=True (the work is done, then the line is cut); corrupt=True (one byte of the
        answer is flipped); reset_after=n or eof_after=n (the line is cut with RST or FIN after n
        bytes of the upload or download); call=function, before any work;
        lies={header: value} and says=bytes or JSON, instead of the true ones.
        """
        self.faults.append({"match": match, "due": iter([False] * skip + [True] * times), **what})

    def take_fault(self, line: str) -> dict[str, Any]:
        return next(
            (
                fault
                for fault in self.faults
                if fault["match"] in line and next(fault["due"], False)
            ),
            {},
        )

    # What a test looks at

    def tree(self, repo: str, revision: str = "main") -> dict[str, str]:
        """{path: sha256 of its content} at a branch, tag or commit."""
        return {path: entry["sha256"] for path, entry in self.at(repo, revision)["tree"].items()}

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        return (self.blobs / self.at(repo, revision)["tree"][path]["sha256"]).read_bytes()

    def titles(self, repo: str) -> list[str]:
        """Titles of the commits of main, the newest first."""
        record, found = self.record(repo), []
        commit = record["log"][record["branch"]["main"]]
        while commit:
            found.append(commit["title"])
            commit = record["log"].get(commit["parent"])
        return found

    def tags(self, repo: str) -> dict[str, str]:
        return self.record(repo)["tag"]

    def head(self, repo: str) -> str:
        return self.record(repo)["branch"]["main"]

    def sent(self, match: str) -> list[int | str]:
        """Statuses of the requests so far whose "METHOD /path" contains `match`."""
        return [r["status"] for r in self.requests if match in f"{r['method']} {r['path']}"]

    # What a test prepares

    def create(self, repo: str, private: bool = False) -> None:
        lines = "".join(
            f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES
        )
        record = {"id": repo, "private": private, "branch": {}, "tag": {}, "log": {}}
        self.add_commit(
            record,
            "main",
            {".gitattributes": self.put_blob(lines.encode())},
            "ada",
            "initial commit",
        )

    def put(self, repo: str, files: dict[str, bytes]) -> None:
        """A commit by somebody else, past all checks."""
        with self.lock:
            record = self.record(repo)
            tree = dict(record["log"][record["branch"]["main"]]["tree"])
            for path, content in files.items():
                tree[path] = self.entry(path, content)
            self.add_commit(record, "main", tree, "mallory", "by somebody else")

    # Storage

    def record(self, repo: str) -> dict[str, Any]:
        return json.loads((self.models / f"{repo}.json").read_text())

    def at(self, repo: str, revision: str) -> dict[str, Any]:
        record = self.record(repo)
        return record["log"][
            record["branch"].get(revision) or record["tag"].get(revision) or revision
        ]

    def write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
            stream.write(data)
        os.replace(stream.name, path)

    def put_blob(self, data: bytes) -> dict[str, Any]:
        sha = hashlib.sha256(data).hexdigest()
        self.write(self.blobs / sha, data)
        name = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's name for it
        return {"oid": name, "size": len(data), "sha256": sha}

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        blob = self.put_blob(content)
        return self.pointer(blob["sha256"], len(content)) if is_lfs(path, len(content)) else blob

    def pointer(self, sha: str, size: int) -> dict[str, Any]:
        """The entry of an LFS file: what git keeps is a pointer to it."""
        text = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()
        )
        lfs = {"oid": sha, "size": size, "pointerSize": len(text)}
        return {**self.put_blob(text), "size": size, "sha256": sha, "lfs": lfs}

    def save(self, record: dict[str, Any]) -> None:
        self.write(self.models / f"{record['id']}.json", json.dumps(record).encode())

    def add_commit(
        self,
        record: dict[str, Any],
        branch: str,
        tree: dict[str, Any],
        user: str,
        title: str,
        message: str = "",
    ) -> str:
        commit = {
            "parent": record["branch"].get(branch),
            "title": title,
            "message": message,
            "tree": tree,
        }
        commit |= {"user": user, "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())}
        commit["id"] = hashlib.sha1(json.dumps(commit).encode()).hexdigest()
        record["log"][commit["id"]], record["branch"][branch] = commit, commit["id"]
        self.save(record)  # one atomic replacement shows both the commit and the new head
        return commit["id"]


def is_lfs(path: str, size: int) -> bool:
    return size >= LFS_MIN_SIZE or path.split(".")[-1] in LFS_SUFFIXES


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart: 40 ms an answer otherwise

    def handle_request(self) -> None:
        self.hub, self.unread, self.fault = (
            self.server,
            int(self.headers.get("Content-Length") or 0),
            {},
        )
        self.entry = {"method": self.command, "path": self.path, "status": "cut"}
        self.entry |= {"auth": "Authorization" in self.headers, "range": self.headers.get("Range")}
        self.hub.requests.append(self.entry)
        try:
            try:
                self.fault = self.hub.take_fault(f"{self.command} {self.path}")
                self.fault.get("call", lambda: None)()
                time.sleep(self.fault.get("delay", 0))
                if "status" in self.fault:
                    raise HubError(
                        self.fault["status"], "Injected fault", **self.fault.get("headers", {})
                    )
                self.dispatch()
            except (
                HubError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                yaml.YAMLError,
            ) as error:
                self.body()  # read the rest of the upload, or the client never sees the answer
                headers = getattr(error, "headers", {})
                self.send(
                    {"errors": [{"message": str(error)}]}, getattr(error, "status", 400), **headers
                )
        except ConnectionError as error:
            if isinstance(error, ConnectionResetError):
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            self.close_connection = True
            self.rfile.close()
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *arguments: Any) -> None:
        """Requests are in HubServer.requests."""

    def dispatch(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/_") and self.path != self.signed(self.command, path):
            raise HubError(403, "Signature does not match")
        for method, pattern, function in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := pattern.fullmatch(path)):
                return function(self, *(group and unquote(group) for group in match.groups()))
        raise HubError(404, f"Not in this server: {self.command} {path}")

    def signed(self, method: str, path: str) -> str:
        signature = hmac.new(self.hub.secret, f"{method} {path}".encode(), "sha256")
        return f"{path}?sig={signature.hexdigest()}"

    def cut(self, seen: int) -> None:
        for key, error in (
            ("reset_after", ConnectionResetError),
            ("eof_after", ConnectionAbortedError),
        ):
            if seen >= self.fault.get(key, seen + 1):
                raise error

    def body(self) -> bytes:
        data = bytearray()
        while self.unread:
            data += (piece := self.rfile.read(min(self.unread, CHUNK)))
            if not piece:
                raise ConnectionAbortedError  # the client went away
            self.unread -= len(piece)
            self.cut(len(data))
        return bytes(data)

    def send(self, data: Any, status: int = 200, **headers: Any) -> None:
        """Bytes, whole or the range that was asked for; anything else as JSON."""
        data, headers = self.fault.get("says", data), headers | self.fault.get("lies", {})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        elif wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        if self.fault.get("corrupt"):
            data = bytes([data[0] ^ 0xFF]) + data[1:]
        if self.fault.get("drop_response"):
            raise ConnectionResetError
        self.send_response(status)
        for name, value in {
            "Content-Length": len(data),
            "X-Request-Id": secrets.token_hex(8),
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        for start in range(0, 0 if self.command == "HEAD" else len(data), CHUNK):
            self.cut(start)
            self.wfile.write(data[start : start + CHUNK])
        self.entry["status"] = status

    def user(self, namespace: str | None = None) -> list[str]:
        """The token's namespaces; refuses who may not write to `namespace`."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        names, _, role = self.hub.tokens.get(token, "").partition(":")
        if (token and not names) or (namespace and not token):
            what = "credentials in Authorization header" if token else "username or password"
            raise HubError(401, f"Invalid {what}.")
        if namespace and (role == "read" or namespace not in names.split("+")):
            raise HubError(403, f"this token may not write to {namespace}")
        return names.split("+") if token else []

    def open(
        self, name: str, revision: str, write: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The repository, and the commit that a branch, a tag or an id points to."""
        names = self.user(name.split("/")[0] if write else None)
        record = self.hub.record(name) if (self.hub.models / f"{name}.json").exists() else None
        if not record or (
            record["private"] and name.split("/")[0] not in names
        ):  # both look alike to a stranger
            status, why = (
                (404, "Repository not found") if names else (401, "Invalid username or password.")
            )
            raise HubError(status, why, "RepoNotFound")
        commit = record["branch"].get(revision) or record["tag"].get(revision) or revision
        if commit not in record["log"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return record, record["log"][commit]

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body())["content"], re.DOTALL)
        card = yaml.safe_load(front[1]) if front else {}
        for key in ("base_model", "datasets"):
            for item in [card[key]] if isinstance(card.get(key), str) else card.get(key) or []:
                if not re.fullmatch(f"({NAME}/)?{NAME}", item):
                    raise HubError(
                        400,
                        f'"{key}" with value "{item}" is not valid. Use an id from https://hf.co.',
                    )
        self.send(
            {
                "warnings": []
                if front
                else [{"message": "empty or missing yaml metadata in repo card"}]
            }
        )

    @route("GET", f"/api/(models|datasets)/{ID}(?:/revision/{REVISION})?")
    def info(self, kind: str, name: str, revision: str | None) -> None:
        if name in self.hub.cards and not (self.hub.models / f"{name}.json").exists():
            return self.send(
                {"id": name, "sha": "0" * 40, "cardData": self.hub.cards[name], "siblings": []}
            )
        record, commit = self.open(name, revision or "main")
        siblings = [{"rfilename": path} for path in commit["tree"]]
        self.send(
            {"id": name, "sha": commit["id"], "private": record["private"], "siblings": siblings}
        )

    @route("GET", f"/api/models/{ID}/auth-check(/write)?")
    def auth_check(self, name: str, write: str | None) -> None:
        self.open(name, "main")
        self.send({"id": self.open(name, "main", write=bool(write))[0]["id"]})

    @route("GET", f"/api/models/{ID}/refs")
    def refs(self, name: str) -> None:
        record, _ = self.open(name, "main")
        rows = {
            kind: [
                {"name": n, "ref": f"refs/{n}", "targetCommit": commit}
                for n, commit in record[kind].items()
            ]
            for kind in ("branch", "tag")
        }
        self.send({"branches": rows["branch"], "tags": rows["tag"], "converts": []})

    @route("POST", f"/api/models/{ID}/tag/{REVISION}")
    def create_tag(self, name: str, revision: str) -> None:
        tag = json.loads(self.body())["tag"]
        with self.hub.lock:
            record, commit = self.open(name, revision, write=True)
            if tag in record["tag"]:
                raise HubError(409, f"Reference already exists: {tag}")
            record["tag"][tag] = commit["id"]
            self.hub.save(record)
        self.send({})

    @route("POST", f"/api/models/{ID}/preupload/{REVISION}")
    def preupload(self, name: str, revision: str) -> None:
        (_, commit), rows = self.open(name, revision, write=True), []
        for file in json.loads(self.body())["files"]:
            path, known = clean_path(file["path"]), commit["tree"].get(file["path"])
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            known = known and known["sha256" if known.get("lfs") else "oid"]
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.send({"files": rows})

    @route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
    def lfs_batch(self, name: str) -> None:
        self.open(name, "main", write=True)
        rows = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(self.body())["objects"]]
        for row in (row for row in rows if not (self.hub.blobs / row["oid"]).exists()):
            row["actions"] = {
                "upload": {"href": self.hub.url + self.signed("PUT", f"/_lfs/{row['oid']}")}
            }
        self.send({"transfer": "basic", "objects": rows})

    @route("PUT", f"/_lfs/{SHA}")
    def lfs_put(self, sha: str) -> None:  # the link is signed, so it needs no token
        data = self.body()
        if hashlib.sha256(data).hexdigest() != sha:
            raise HubError(400, "Content does not match its sha256")
        self.hub.put_blob(data)
        self.send({})

    @route("POST", f"/api/models/{ID}/commit/{REVISION}")
    def commit(self, name: str, branch: str) -> None:
        """All operations or none: the branch moves once, after every line was checked."""
        header, *lines = [json.loads(line) for line in self.body().splitlines()]
        parent, *message = [
            header["value"].get(key, "") for key in ("parentCommit", "summary", "description")
        ]
        with self.hub.lock:
            record, head = self.open(name, branch, write=True)
            if (
                not record["branch"].get(branch, "").startswith(parent or head["id"])
            ):  # moved on, or not a branch
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(head["tree"])
            for line in lines:
                self.apply(
                    tree, line["key"], clean_path(line["value"]["path"].rstrip("/")), line["value"]
                )
            made = self.hub.add_commit(record, branch, tree, self.user()[0], *message)
        self.send(
            {
                "success": True,
                "commitOid": made,
                "commitUrl": f"{self.hub.url}/{name}/commit/{made}",
            }
        )

    def apply(self, tree: dict[str, Any], key: str, path: str, value: dict[str, Any]) -> None:
        if key == "file":
            tree[path] = self.hub.put_blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            sha, size = Path(value["oid"]).name, value["size"]
            if not (self.hub.blobs / sha).exists() or (self.hub.blobs / sha).stat().st_size != size:
                raise HubError(400, f"{path}: the LFS pointer points to a file that does not exist")
            tree[path] = self.hub.pointer(sha, size)
        else:
            gone = [
                p
                for p in tree
                if (p.startswith(path + "/") if key == "deletedFolder" else p == path)
            ]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for p in gone:
                del tree[p]

    @route("GET", f"/api/models/{ID}/tree/{REVISION}(?:/(.+))?")
    def list_tree(self, name: str, revision: str, folder: str | None) -> None:
        (_, commit), prefix, rows = self.open(name, revision), f"{folder}/" if folder else "", {}
        for path, entry in commit["tree"].items():
            if path.startswith(prefix):
                top = (
                    path
                    if "recursive=true" in self.path
                    else prefix + path[len(prefix) :].split("/")[0]
                )
                rows[top] = {
                    "path": top,
                    **({"type": "file", **entry} if top == path else {"type": "directory"}),
                }
        if folder and not rows:
            raise HubError(
                404, f"{folder} does not exist", "EntryNotFound", **{"X-Repo-Commit": commit["id"]}
            )
        self.send(list(rows.values()))

    @route("GET", f"/{ID}/resolve/{REVISION}/(.+)")
    def resolve(self, name: str, revision: str, path: str) -> None:
        _, commit = self.open(name, revision)
        entry, headers = commit["tree"].get(path), {"X-Repo-Commit": commit["id"]}
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        if not entry.get("lfs"):
            return self.send(
                (self.hub.blobs / entry["sha256"]).read_bytes(), ETag=f'"{entry["oid"]}"', **headers
            )
        headers |= {"X-Linked-Size": entry["size"], "X-Linked-ETag": f'"{entry["sha256"]}"'}
        if self.hub.promises_xet:
            headers["X-Xet-Hash"] = entry["sha256"]
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{name}/xet-read-token/main"
        self.send(
            {},
            302,
            Location=self.hub.cdn + self.signed("GET", f"/_cdn/{entry['sha256']}"),
            **headers,
        )

    @route("GET", f"/api/models/{ID}/xet-read-token/main")
    def xet_token(self, name: str) -> None:
        told = {"Access-Token": "token", "Cas-Url": self.hub.url, "Token-Expiration": 2**32}
        self.send({}, **{f"X-Xet-{key}": value for key, value in told.items()})

    @route("GET", f"/_cdn/{SHA}")
    def cdn(self, sha: str) -> None:
        """Where LFS files really come from: another origin, a signed link, no token."""
        self.send((self.hub.blobs / sha).read_bytes(), ETag=f'"{sha}"')


if (
    __name__ == "__main__"
):  # FOLDER ADDRESS NAME: for other networks; says its variables, then serves until killed
    folder, *place = sys.argv[1:]
    served = HubServer(Path(folder) / "hub", *place)
    served.create(REPO)
    print(json.dumps(served.environment(OWNER, Path(folder) / "home")), flush=True)
    threading.Event().wait()
