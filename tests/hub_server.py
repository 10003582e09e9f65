# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A stand-in for the Hub: the endpoints that huggingface_hub needs to share a model, over HTTP on loopback.

python tests/hub_server.py FOLDER      # prints its address; set HF_ENDPOINT to it, HF_TOKEN and HF_HUB_DISABLE_XET=1

What it keeps lies in FOLDER: `lfs/OID` is a large file by its SHA-256, `repos/OWNER/NAME/info.json` what is known, and
`repos/OWNER/NAME/COMMIT/` the whole tree of a commit, large files as links; a Space lies in `repos/spaces/OWNER/NAME`.
Nothing is locked: it is for tests. Xet, branches and datasets are left out.
"""

import base64
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "ada"
TOKEN = "hf_ada"  # may write what is Ada's
OTHER_TOKEN = "hf_eve"  # may read
LARGE = 10_000  # bytes from which on a file goes through LFS, as weights do on the Hub


class Hub(ThreadingHTTPServer):
    """The server, what it has seen, and what it is told to refuse."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []  # (method, path) of each, in order
        self.uploads_until_failure: int | None = None  # so many large files are taken; the next one fails, once
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def repo(self, repo_id: str) -> Path:
        return self.folder / "repos" / repo_id

    def info(self, repo_id: str) -> dict[str, Any] | None:
        path = self.repo(repo_id) / "info.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def tree(self, repo_id: str) -> dict[str, Path]:
        """The files of the newest commit by their names."""
        info = self.info(repo_id)
        root = self.repo(repo_id) / info["sha"]
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


def client_environment(hub: Hub) -> dict[str, str]:
    """Variables of a process that knows no Hub but this one, as the user Ada."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}


def use_hub(hub: Hub, monkeypatch: Any, cache: Path) -> None:
    """Makes this process, which has read its variables already, such a process."""
    for name, value in client_environment(hub).items():
        monkeypatch.setenv(name, value)
    template = "{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{template}", "HF_HUB_CACHE": str(cache)}
    for name, value in {**values, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)  # of the functions that are no methods


@contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append((self.command, path))
        match path.split("/"):
            case ["api", "whoami-v2"]:
                self._whoami()
            case ["api", "validate-yaml"]:  # the Hub's own check of a card cannot be had here
                self._answer({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "models" | "spaces" as kind, owner, name, *request]:
                self._repository_request(f"{'spaces/' * (kind == 'spaces')}{owner}/{name}", request)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._lfs_batch(f"{owner}/{name.removesuffix('.git')}")
            case ["lfs", oid]:
                self._lfs_upload(oid)
            case [owner, name, "resolve", _, *file]:
                self._resolve(f"{owner}/{name}", "/".join(file))
            case _:
                self._refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _repository_request(self, repo_id: str, request: list[str]) -> None:
        match request:
            case ["preupload", _]:
                self._preupload(repo_id)
            case ["commit", _]:
                self._commit(repo_id)
            case ["tree", _, *folder]:
                self._tree(repo_id, "/".join(folder))
            case _:
                self._info(repo_id)

    # Who, and what they may

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _whoami(self) -> None:
        name = {TOKEN: USER, OTHER_TOKEN: "eve"}.get(self._token())
        return self._answer({"type": "user", "name": name, "orgs": []}) if name else self._refuse(401)

    def _may_write(self, repo_id: str) -> bool:
        if self._token() not in (TOKEN, OTHER_TOKEN):
            self._refuse(401, message="Invalid username or password.")
        elif self._token() != TOKEN or not repo_id.removeprefix("spaces/").startswith(f"{USER}/"):
            self._refuse(403, message=f"You don't have the rights to write to {repo_id}.")
        else:
            return True
        return False

    def _read(self, repo_id: str) -> dict[str, Any] | None:
        """What is known of a repository; without it, or for a stranger to a private one, the answer is given."""
        info = self.server.info(repo_id)
        if info is None or (info["private"] and self._token() != TOKEN):
            self._refuse(404 if self._token() else 401, "RepoNotFound")
            return None
        return info

    # Repositories

    def _create(self) -> None:
        asked = json.loads(self.body)
        is_space = asked.get("type") == "space"
        repo_id = f"{'spaces/' * is_space}{asked.get('organization') or USER}/{asked['name']}"
        if not self._may_write(repo_id):
            return
        if self.server.info(repo_id) is not None:
            return self._answer({"url": f"{self.server.url}/{repo_id}", "error": "You already created it"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        info = {"id": repo_id.removeprefix("spaces/"), "private": private}
        self._new_commit(repo_id, {**info, "sdk": asked["sdk"]} if is_space else info, {})
        self._answer({"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def _new_commit(self, repo_id: str, info: dict[str, Any], files: dict[str, bytes | Path]) -> str:
        """A folder with the files of the last commit and the new ones, and from then on the newest."""
        repo = self.server.repo(repo_id)
        sha = hashlib.sha1(os.urandom(20)).hexdigest()
        if "sha" in info:
            shutil.copytree(repo / info["sha"], repo / sha, symlinks=True)
        else:
            (repo / sha).mkdir(parents=True)
        for name, content in files.items():
            path = repo / sha / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(content) if isinstance(content, Path) else path.write_bytes(content)
        (repo / "info.json").write_text(json.dumps({**info, "sha": sha}))
        return sha

    def _info(self, repo_id: str) -> None:
        info = self._read(repo_id)
        if info is not None:
            self._answer({**info, "siblings": [{"rfilename": name} for name in self.server.tree(repo_id)]})

    def _tree(self, repo_id: str, folder: str) -> None:
        if self._read(repo_id) is not None:
            names = [name for name in self.server.tree(repo_id) if name.startswith(f"{folder}/" if folder else "")]
            self._answer([self._entry(repo_id, name) for name in names]) if names else self._refuse(
                404, "EntryNotFound"
            )

    def _entry(self, repo_id: str, name: str) -> dict[str, Any]:
        path = self.server.tree(repo_id)[name]
        oid, size = etag(path), path.stat().st_size
        large = {"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if path.is_symlink() else {}
        return {"type": "file", "path": name, "size": size, "oid": oid, **large}

    # Uploading

    def _preupload(self, repo_id: str) -> None:
        if self._may_write(repo_id) and self._read(repo_id) is not None:
            asked = json.loads(self.body)["files"]
            modes = ["lfs" if file["size"] >= LARGE else "regular" for file in asked]
            tree = self.server.tree(repo_id)
            self._answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": mode,
                            "shouldIgnore": False,
                            "oid": etag(tree[file["path"]]) if file["path"] in tree else None,
                        }
                        for file, mode in zip(asked, modes, strict=True)
                    ]
                }
            )

    def _lfs_batch(self, repo_id: str) -> None:
        if self._may_write(repo_id):
            objects = json.loads(self.body)["objects"]
            for item in objects:
                if not (self.server.folder / "lfs" / item["oid"]).exists():
                    item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
            self._answer({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str) -> None:
        with self.server.counting:  # uploads run in parallel
            left = self.server.uploads_until_failure
            if left is not None:
                self.server.uploads_until_failure = left - 1 if left else None
        if left == 0:
            return self._refuse(507, message="The disk is full.")
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._refuse(400, message="These bytes are not of this SHA-256.")
        path = self.server.folder / "lfs" / oid
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.body)
        self._answer({})

    def _commit(self, repo_id: str) -> None:
        if not self._may_write(repo_id) or (info := self._read(repo_id)) is None:
            return
        files: dict[str, bytes | Path] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                info["message"] = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.folder / "lfs" / value["oid"]
            else:
                return self._refuse(400, message=f"{item['key']} is not known here.")
        sha = self._new_commit(repo_id, info, files)
        self._answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    # Downloading

    def _resolve(self, repo_id: str, name: str) -> None:
        info = self._read(repo_id)
        if info is None:
            return
        path = self.server.tree(repo_id).get(name)
        if path is None:
            return self._refuse(404, "EntryNotFound", headers={"X-Repo-Commit": info["sha"]})
        self._send(200, path.read_bytes(), {"X-Repo-Commit": info["sha"], "ETag": f'"{etag(path)}"'})

    # Answers

    def _answer(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(
        self, status: int, code: str | None = None, message: str = "", headers: dict[str, str] | None = None
    ) -> None:
        headers = {**(headers or {}), **({"X-Error-Code": code} if code else {}), "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read_chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def log_message(self, *_: Any) -> None:
        pass


def etag(path: Path) -> str:
    """As git names a small file, and the Hub a large one."""
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest() if path.is_symlink() else git_blob(content)


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


if __name__ == "__main__":
    with running_hub(Path(sys.argv[1]).resolve()) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()
