"""A loopback server that speaks enough of W&B's API to be sent runs, workspaces and reports; and that can misbehave."""

import gzip
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "k" * 40
PROJECT = {"id": "UHJvamVjdA==", "internalId": "1", "name": "archzoo", "entityName": "zoo", "user": None}
PROJECT |= {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that hang up, as those of a process that is killed."""


class WandbServer:
    """A W&B server on 127.0.0.1. Use as a context manager.

    `requests` has all that it was asked, as (path, body); `lines` the history lines that it took, by run id; `files`
    the names of the files that it took; `runs`, by id, and `views`, by type (`project-view`, a workspace; `runs`, a
    report), the GraphQL variables that made them. `on_run` is called when a run begins.

    Args:
        manner: `good`; `hole` (takes connections, never answers); `bad key` (401); `error` (500).
        delay: Seconds before an answer.
    """

    def __init__(self, manner: str = "good", delay: float = 0.0):
        self.manner, self.delay = manner, delay
        self.requests: list[tuple[str, Any]] = []
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self.files: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.on_run: Callable[[], None] = lambda: None
        self._released = threading.Event()
        self._http = _Quiet(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuses connections from now on."""
        self._released.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What makes wandb use this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question."""
        entity = variables.get("entity") or variables.get("entityName") or "zoo"
        viewer = {"id": "VXNlcjox", "entity": "zoo", "username": "zoo", "flags": "{}", "teams": {"edges": []}}
        if "upsertBucket" in query:
            name = variables["name"]
            if name not in self.runs:
                self.on_run()
            self.runs[name] = variables
            bucket = {"id": f"run:{name}", "name": name, "displayName": variables.get("displayName"), "config": "{}"}
            bucket |= {"sweepName": None, "historyLineCount": 0, "description": "", "tags": [], "commit": ""}
            bucket["project"] = PROJECT | {"name": variables["project"], "entity": {"name": entity}}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            names = variables["files"]
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in names]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            kind = variables["type"]
            self.views[kind] = variables
            view = {"id": variables.get("id") or f"id-of-{kind}", "displayName": variables["displayName"]}
            view |= {"project": PROJECT}
            view |= {"name": variables.get("name"), "type": kind, "spec": variables["spec"]}
            view |= {"description": "", "updatedAt": "2026-01-01T00:00:00"}
            return {"upsertView": {"view": view, "inserted": True}}
        if "GetProjects" in query:
            page = {"hasNextPage": False, "endCursor": None}
            return {"models": {"edges": [{"cursor": "", "node": PROJECT}], "pageInfo": page}}
        return {"viewer": viewer, "project": PROJECT, "model": None, "serverInfo": None}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if server.manner == "hole":
                    server._released.wait(600)
                    self.close_connection = True
                    return
                time.sleep(server.delay)
                status, answer = server._answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer  # noqa: N815 - the base class calls them so

        return Handler

    def _answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.manner == "bad key":
            return 401, {"errors": [{"message": "user is not logged in"}]}
        if self.manner == "error":
            return 500, {"error": "internal"}
        if path.startswith("/upload/"):
            self.files.append(path.removeprefix("/upload/").partition("?")[0])
            self.requests.append((path, body))
            return 200, {}
        content = json.loads(body or b"{}")
        self.requests.append((path, content))
        if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            for name, part in (content.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    lines = self.lines.setdefault(stream[1], [])
                    lines[part["offset"] :] = map(json.loads, part["content"])
            return 200, {"exitcode": None, "limits": {}}
        if path == "/graphql":
            return 200, {"data": self.graphql(content["query"], content.get("variables") or {})}
        return 200, {}
