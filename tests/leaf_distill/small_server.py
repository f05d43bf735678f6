"""A real HTTP server on loopback whose answers come from a real, tiny model.

It speaks as much of the OpenAI protocol as `leaf` sends. Requests can be made to fail: `troubles`
holds functions, each of which handles one request for an answer in the server's place.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "tiny"
KEY = "a-secret-key"


class SmallServer(ThreadingHTTPServer):
    """Attributes: bodies: what was posted; busiest: the most requests that were in flight."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, model: str, port: int = 0) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.flying = 0
        self.reset()
        self.lock, self.turn = threading.Lock(), threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    def reset(self) -> None:
        """Forget what was asked, and let nothing fail."""
        self.bodies: list[dict[str, Any]] = []
        self.troubles: list[Callable[[Handler], None]] = []
        self.key: str | None = None
        self.delay_s, self.busiest = 0.0, 0
        self.max_logprobs = 20
        self.spoil: Callable[[list[Any]], Any] = lambda entries: entries

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that a test drops."""

    def prompt_logprobs(self, ids: list[int], top_k: int) -> list[Any]:
        """Return what the model says about each token of a prompt, in vLLM's form."""
        with self.turn, torch.inference_mode():
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: list[Any] = [None]
        for row, token in zip(logprobs, ids[1:], strict=False):
            ranks = {token: 1 + int((row > row[token]).sum())}
            ranks |= {one: rank for rank, one in enumerate(row.topk(top_k).indices.tolist(), 1)}
            entries.append(
                {
                    str(one): {
                        "logprob": float(row[one]),
                        "rank": rank,
                        "decoded_token": self.tokenizer.decode([one]),
                    }
                    for one, rank in ranks.items()
                }
            )
        return entries

    def answer(self, text: str, body: dict[str, Any]) -> tuple[str, str, int]:
        """Return the greedy answer, why it ended, and its number of tokens."""
        ids = self.tokenizer(text, return_tensors="pt")
        length = ids["input_ids"].shape[1]
        with self.turn, torch.inference_mode():
            torch.manual_seed(body.get("seed", 0))
            drawn = {"do_sample": body["temperature"] > 0, "top_p": body.get("top_p", 1.0)}
            if body["temperature"] > 0:
                drawn["temperature"] = body["temperature"]
            out = self.model.generate(**ids, max_new_tokens=body["max_tokens"], **drawn)
        tokens = out[0, length:].tolist()
        ended = tokens[-1] == self.tokenizer.eos_token_id
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return answer, "stop" if ended else "length", len(tokens)


class Handler(BaseHTTPRequestHandler):
    server: SmallServer
    protocol_version = "HTTP/1.1"
    flies = False

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.landed()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.reply(401, {"error": {"message": "the key is wrong"}})
        return False

    def do_GET(self) -> None:
        if self.allowed():
            self.reply(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.flying += 1
            self.flies = True
            server.busiest = max(server.busiest, server.flying)
            trouble = server.troubles.pop(0) if server.troubles else None
        try:
            if not self.allowed():
                return
            if trouble is not None:
                trouble(self)
                return
            self.give(body)
        finally:
            self.landed()

    def landed(self) -> None:
        """Count the request as no longer in flight, before its client may send the next."""
        with self.server.lock:
            self.server.flying -= self.flies
            self.flies = False

    def give(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.bodies.append(body)
        time.sleep(server.delay_s)
        if body["model"] != NAME:
            message = f"The model `{body['model']}` does not exist."
            self.reply(404, {"error": {"message": message}})
            return
        if "prompt_logprobs" in body:
            self.give_logprobs(body)
            return
        chat = self.path == "/v1/chat/completions"
        text = body.get("prompt", "")
        if chat:
            variables = body.get("chat_template_kwargs", {})
            text = server.tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True, **variables
            )
        room = server.model.config.max_position_embeddings - len(server.tokenizer(text).input_ids)
        if room <= 0:
            message = "the prompt exceeds the maximum context length"
            self.reply(400, {"error": {"message": message}})
            return
        answer, why, count = server.answer(text, body)
        said = {"message": {"role": "assistant", "content": answer}} if chat else {"text": answer}
        choice = {"index": 0, "finish_reason": why, **said}
        self.reply(200, {"choices": [choice], "usage": {"completion_tokens": count}})

    def give_logprobs(self, body: dict[str, Any]) -> None:
        """Answer or refuse as vLLM does; its sentences are those of vLLM 0.32."""
        server, ids, top_k = self.server, body["prompt"], body["prompt_logprobs"]
        longest = server.model.config.max_position_embeddings
        said = None
        if (most := min(body["max_tokens"], longest - len(ids))) == 0:
            said = "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"
        elif top_k > server.max_logprobs:
            said = f"Requested prompt logprobs of {top_k}, which is greater than max allowed: "
            said += str(server.max_logprobs)
        elif most < 0:
            said = f"This model's maximum context length is {longest} tokens. However, your "
            said += f"prompt contains {len(ids)} input tokens"
        if said is not None:
            self.reply(400, {"error": {"message": said, "type": "BadRequestError", "code": 400}})
            return
        entries = server.spoil(server.prompt_logprobs(ids, top_k))
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": entries}
        self.reply(200, {"choices": [choice]})


@contextmanager
def serving(model: str, port: int = 0) -> Iterator[SmallServer]:
    server = SmallServer(model, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, message: str = "trouble", **headers: str) -> Callable[[Handler], None]:
    """A response with a status, such as 429 with Retry_After."""
    return lambda handler: handler.reply(code, {"error": {"message": message}}, **headers)


def malformed(handler: Handler) -> None:
    handler.reply(200, b"<html>it works</html>")


def pointless(handler: Handler) -> None:
    handler.reply(200, {"choices": []})


def dropped(handler: Handler) -> None:
    """Close the connection before a response."""
    handler.close_connection = True
    handler.connection.shutdown(2)


def half(handler: Handler) -> None:
    """Close the connection within a response."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def silent(handler: Handler) -> None:
    """Say nothing for two seconds."""
    time.sleep(2)
    handler.close_connection = True
