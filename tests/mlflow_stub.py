"""A tracking server with one experiment, kept in memory, that can be made to fail, to hang and to go away."""

import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubServer:
    """Serves the REST calls that a run makes, keeping one of equal points as MLflow does; no models, as MLflow 2 has none.

    `mode` is ok, error (answers 500), denied (401) or hang (answers nothing until released). The files of every run go to
    the folder `artifacts`.
    """

    def __init__(self) -> None:
        self.mode, self.runs, self.released, self.port, self.artifacts = "ok", {}, threading.Event(), 0, ""
        self.started()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def started(self) -> None:
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def gone(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def points(self, run_id: str) -> list[tuple[str, int]]:
        return [(metric["key"], int(metric["step"])) for metric in self.runs[run_id]["metrics"]]

    def answer(self, call: str, request: dict) -> dict:
        if call == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}}
        if call == "runs/search":
            return {}
        if call == "runs/create":
            run_id = f"{len(self.runs):032x}"
            self.runs[run_id] = {"metrics": [], "params": [], "tags": request["tags"], "status": "RUNNING"}
            return self._run(run_id)
        run = self.runs[request["run_id"]]
        if call == "runs/log-batch":
            for kind in ("metrics", "params", "tags"):
                run[kind] += [item for item in request.get(kind, []) if item not in run[kind]]
        elif call == "runs/set-tag":
            run["tags"].append({"key": request["key"], "value": request["value"]})
        elif call == "runs/update":
            run["status"] = request["status"]
        return self._run(request["run_id"])

    def _run(self, run_id: str) -> dict:
        run = self.runs[run_id]
        info = {"run_id": run_id, "experiment_id": "1", "status": run["status"], "lifecycle_stage": "active"}
        info["artifact_uri"] = self.artifacts
        return {"run": {"info": info, "data": {"tags": run["tags"]}}, "run_info": info}


class _Handler(BaseHTTPRequestHandler):
    stub: StubServer

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self._reply(url.path, dict(urllib.parse.parse_qsl(url.query)))

    def do_POST(self) -> None:
        self._reply(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, path: str, request: dict) -> None:
        if self.stub.mode == "hang":
            self.stub.released.wait(60)
            return
        call = path.partition("/mlflow/")[2]
        known = call.startswith(("experiments/", "runs/"))
        status = {"error": 500, "denied": 401}.get(self.stub.mode, 200 if known else 404)
        body = json.dumps(self.stub.answer(call, request)).encode() if status == 200 else b"not today"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps the test output quiet."""
