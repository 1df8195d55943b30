"""A server on this machine that speaks as much of Weights & Biases as ``wandb sync`` asks for.

It keeps what arrives as W&B does: the files of a run are lines by number, and a sender that begins
again at line 0 replaces what was there.

    with WandbServer() as server:
        subprocess.run(["wandb", "sync", "runs/demo/wandb"], env=os.environ | server.environment)
        server.history("3f9c21aa")    # [{"train_step": 1, "loss": 4.1, ...}, ...]
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

HISTORY = "wandb-history.jsonl"


class WandbServer:
    """Runs by id: what was told of them, their files, and the lines of what streams."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        """Variables of the calls that made or changed a run, the newest of each."""
        self.lines: dict[str, dict[str, dict[int, str]]] = {}
        """Streamed lines by run, file and number."""
        self.files: dict[str, bytes] = {}
        """Uploaded files by path."""
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        """Saved workspaces."""
        self.unknown: list[str] = []
        """Operations that were answered with nothing."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send wandb here."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": "0" * 40}

    def history(self, run: str) -> list[dict[str, Any]]:
        """Rows of a run in order."""
        lines = self.lines.get(run, {}).get(HISTORY, {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take lines of a run."""
        for name, part in body.get("files", {}).items():
            kept = self.lines.setdefault(run, {}).setdefault(name, {})
            for number, line in enumerate(part["content"], part["offset"]):
                kept[number] = line
        return {"exitcode": None, "limits": {}}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one GraphQL operation."""
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
        if "RunResumeStatus" in query:
            bucket = self._bucket(variables["name"])
            return {"model": {"id": "p", "name": "p", "entity": _ENTITY, "bucket": bucket}}
        if "createRunFiles" in query:
            run = variables["run"]
            files = [
                {"name": name, "uploadUrl": f"{self.address}/storage/{run}/{name}"}
                for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if "upsertView" in query:
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "v", "name": "llmtrain"}, "inserted": True}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "username": "me", "entity": "me", "flags": "{}",
                               "teams": {"edges": []}}}  # fmt: skip
        if "OrganizationCoreWeaveOrganizationID" in query:
            return {"entity": {"organization": None}}
        self.unknown.append(query)
        return {}

    def _bucket(self, run: str) -> dict[str, Any] | None:
        """What a run that is resumed is told of its past."""
        if run not in self.runs:
            return None
        history = self.history(run)
        tail = [json.dumps(row) for row in history[-1:]]
        return {
            "name": run, "displayName": run, "summaryMetrics": json.dumps(history[-1]),
            "config": self.runs[run].get("config", "{}"), "historyTail": json.dumps(tail),
            "eventsTail": "[]", "historyLineCount": len(history), "eventsLineCount": 0,
            "logLineCount": 0, "tags": [], "notes": None, "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables.get("id")
        told = {key: value for key, value in variables.items() if value is not None}
        self.runs.setdefault(name, {}).update(told)
        return {
            "id": name, "name": name, "displayName": told.get("displayName", name),
            "description": None, "config": "{}", "sweepName": None, "historyLineCount": 0,
            "project": {"id": "p", "name": told.get("project", "p"), "entity": _ENTITY},
        }  # fmt: skip


_ENTITY = {"id": "e", "name": "me"}


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            parts, body = self.path.strip("/").split("/"), self._body()
            if parts[-1] == "file_stream":
                self._reply(server.stream(parts[-2], json.loads(body)))
            elif parts[-1] == "graphql":
                asked = json.loads(body)
                found = server.answer(asked["query"], asked.get("variables") or {})
                self._reply({"data": found})
            else:  # what wandb says of itself
                self._reply({})

        def do_PUT(self) -> None:
            server.files[self.path.removeprefix("/storage/")] = self._body()
            self._reply({})

        def do_GET(self) -> None:
            self._reply({})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _reply(self, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    return Handler
