"""Servers of other projects, each a process of its own in an environment of its own.

LEAF_TEST_SERVERS names another environment that has `transformers[serving]` and xllamacpp than that
of `make test-slow`, LEAF_TEST_VLLM another one that has vLLM than `make .venv/.vllm` makes.

Run as a script in that environment it is llama.cpp's server on a GGUF file.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

PYTHON = Path(os.environ.get("LEAF_TEST_SERVERS", Path(sys.prefix) / "servers")) / "bin/python"
ABSENT = "the servers are not installed; run: make test-slow"
VLLM = Path(os.environ.get("LEAF_TEST_VLLM", Path(sys.prefix) / "vllm")) / "bin/python"
START_S = 300.0


class RealServer:
    """A server that can be killed and started again at the same address."""

    def __init__(self, kind: str, model: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.kind, self.model, self.log = kind, model, log
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = ["127.0.0.1", str(self.port)]
        command = {
            "transformers": [
                *("-m", "transformers.cli.transformers", "serve", self.model, "--device", "cpu"),
                *("--host", where[0], "--port", where[1]),
            ],
            "llama.cpp": [__file__, self.model, where[1]],
            "vllm": [
                *("-m", "vllm.entrypoints.openai.api_server", "--model", self.model),
                *("--host", where[0], "--port", where[1], "--served-model-name", "real"),
                *("--dtype", "float32", "--enforce-eager", "--max-model-len", "64"),
            ],
        }[self.kind]
        python = VLLM if self.kind == "vllm" else PYTHON
        kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        environment = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python, *command],
                stderr=log,
                stdout=log,
                env=environment,
                start_new_session=True,  # vLLM has processes of its own
            )
        end = time.monotonic() + START_S
        while not self._ready():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as found:
                return bool(found.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(kind: str, model: str, log: Path) -> Iterator[RealServer]:
    server = RealServer(kind, model, log)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.kill()


class Counter(ThreadingHTTPServer):
    """A proxy on loopback that counts requests for answers.

    Attributes: count; busiest: the most of them in flight; at: functions by the number of the
        request before which they are called.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        self.target = target.removesuffix("/v1")
        self.count = self.flying = self.busiest = 0
        self.at: dict[int, Any] = {}
        self.lock = Lock()
        super().__init__(("127.0.0.1", 0), _Forward)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that a test drops."""


class _Forward(BaseHTTPRequestHandler):
    server: Counter

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.forward(None)

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            server.count += 1
            server.flying += 1
            server.busiest = max(server.busiest, server.flying)
            if action := server.at.pop(server.count, None):
                action()
        self.forward(body)

    def forward(self, body: bytes | None) -> None:
        """Pass a request on; a target that is away is a connection that breaks."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.target + self.path, body, headers)
        try:
            with urllib.request.urlopen(request) as response:
                status, data = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        except OSError:
            status, data = 0, b""
        if body is not None:  # before its client may send the next
            with self.server.lock:
                self.server.flying -= 1
        if not status:
            self.connection.close()
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def counting(target: str) -> Iterator[Counter]:
    proxy = Counter(target)
    thread = Thread(target=proxy.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def _serve_gguf(model: str, port: int) -> None:
    from xllamacpp import CommonParams, Server  # type: ignore[import-not-found]

    settings = CommonParams()
    settings.model.path, settings.hostnames, settings.port = model, ["127.0.0.1"], port
    settings.n_ctx, settings.n_parallel, settings.ui = 4096, 4, False
    settings.cpuparams.n_threads = 2
    server = Server(settings)
    print("ready at", server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    _serve_gguf(sys.argv[1], int(sys.argv[2]))
