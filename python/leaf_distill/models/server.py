"""Answers from a server that speaks the OpenAI protocol: vLLM, SGLang, llama.cpp, and others.

Several requests are in flight at once, each answer is handed on as it comes, and what passes (a
server that restarts, a full queue, a lost connection) is waited for.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

from leaf_distill.config import TeacherServerOptions
from leaf_distill.data.example import Answer, Role
from leaf_distill.models.protocol import (
    Failure,
    Request,
    checked_url,
    read_answer,
    read_models,
    send,
)

logger = logging.getLogger(__name__)

PASSING: Final = (408, 425, 429, 502, 503, 504, 529)
"""Statuses of a server that is busy or starting."""
FINAL: Final = (301, 302, 303, 307, 308, 401, 403, 404, 405)
"""Statuses that all requests would get."""
TRIES = 4
"""How often a request is sent that makes the server fail."""
THREAD = "answers of a server"
REFUSALS = 20
"""So many refused requests, and no answer, are taken for a wrong setting."""
WAITS_S = (0.5, 30.0)
"""The shortest and the longest wait before a request is sent again, up to chance."""
LONG = re.compile(r"context|too (long|large|many tokens)|maximum.*(length|tokens)|exceed", re.I)


T = TypeVar("T")


class Refusal(NamedTuple):
    """Why the server does not answer one request.

    Attributes:
        verdict: "too_long" for its context, or "server_refused".
        detail: the server's words.
    """

    verdict: Literal["too_long", "server_refused"]
    detail: str


class ServerError(RuntimeError):
    """The server prevents the work; the message says what to do."""


class ServerAway(ServerError):
    """The server cannot be reached, or is busy for too long."""


@dataclass(frozen=True)
class Server:
    """The place of one model's answers.

    Attributes:
        role: the model's part in the run.
        url: below which the protocol's paths lie, such as "http://127.0.0.1:8000/v1".
        model: the name that requests give.
        concurrency: the most requests in flight.
        timeout_s: the longest wait for one answer, and for a server that gives none.
        api_key: sent as a bearer token, and written nowhere.
    """

    role: Role
    url: str
    model: str
    concurrency: int
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)

    def answers(
        self, requests: Sequence[Request], *, proven: bool = False
    ) -> Generator[tuple[int, Answer], None, None]:
        """Yield each request's position and answer; see `replies`.

        An answer has the verdict None, "cut_off", or where there is none "too_long" for the
        server's context or "server_refused", with the server's words as `detail`.

        Args:
            requests: what is sent, in this order.
            proven: whether such requests have been answered before. Otherwise the work ends where
                the server refuses the first REFUSALS.

        Raises:
            ServerError: as of `replies`, or the server would refuse all requests.
        """
        refused = 0

        def read(body: Any, at: int) -> Answer:
            return read_answer(body, requests[at])

        with closing(self.replies(requests, len(requests), read)) as replies:
            for at, found in replies:
                if not isinstance(found, Refusal):
                    proven = True
                    yield at, found
                    continue
                refused += found.verdict == "server_refused"
                proven |= found.verdict != "server_refused"
                if refused >= REFUSALS and not proven:
                    wanted = f"an answer to one of {refused} requests"
                    raise ServerError(self.sentence(wanted, found.detail))
                yield at, Answer("", 0, *found)

    def replies(
        self, requests: Iterable[Request], number: int, read: Callable[[Any, int], T]
    ) -> Generator[tuple[int, T | Refusal], None, None]:
        """Yield each request's position and what is read from its reply, in the order they come.

        No more than `concurrency` requests are in flight or wait for the caller to come back.

        Args:
            requests: what is sent, in this order; each is made when its turn comes.
            number: how many there are.
            read: takes the JSON of a response and the position of its request, in some thread.
                Where it raises Failure the request is sent again.

        Raises:
            ServerError: the server is away for too long, or would refuse all requests.
        """
        work = _Work(self, requests, read)
        for _ in range(min(self.concurrency, number)):
            # A daemon, so that an interrupted program does not wait for what is in flight.
            threading.Thread(target=work.run, name=THREAD, daemon=True).start()
        try:
            for _ in range(number):
                at, found = work.results.get()
                if isinstance(found, BaseException):
                    raise found
                yield at, found
                work.places.release()
        finally:
            work.stop()

    def list_models(self) -> list[str]:
        """Return the names that the server lists; none where it has no list.

        Raises:
            ServerError: it refuses the key.
            ServerAway: it cannot be reached.
        """
        for left in (2, 1, 0):
            try:
                listed = self.send("models", None, min(self.timeout_s, 20.0))
                break
            except Failure as failure:
                if failure.status in (404, 405, 501):
                    return []
                if failure.status in FINAL or not left:
                    kind = ServerError if failure.status in FINAL else ServerAway
                    raise kind(self.sentence("its list of models", failure.said)) from None
                time.sleep(WAITS_S[0])
        return read_models(listed)

    def send(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        """Return the JSON of one response; Failure as of `protocol.send`."""
        return send(self.url, path, body, api_key=self.api_key, timeout_s=timeout_s)

    def sentence(self, wanted: str, got: str) -> str:
        """Return what is said of a server that does not give what is wanted."""
        return (
            f"{self.role}_server_url: must give {wanted}, got from {self.url}: {got}; check the "
            f"server, its model (--{self.role}_server_model, now {self.model!r}) and its key "
            f"({key_names(self.role)[0]}), and run the same command again: known answers are kept"
        )


class _Work(Generic[T]):
    """The requests of one call, which several threads send."""

    def __init__(
        self, server: Server, requests: Iterable[Request], read: Callable[[Any, int], T]
    ) -> None:
        self.server, self.read = server, read
        self.left = iter(enumerate(requests))
        self.lock = threading.Lock()
        self.places = threading.Semaphore(server.concurrency)
        self.results: queue.SimpleQueue[tuple[int, T | Refusal | BaseException]]
        self.results = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.told = -float("inf")  # when a wait was last logged

    def stop(self) -> None:
        """Let the threads end, each when what it has sent is answered."""
        self.stopped.set()
        self.places.release(self.server.concurrency)

    def run(self) -> None:
        while self.places.acquire() and not self.stopped.is_set():
            with self.lock:
                at, request = next(self.left, (-1, None))
            if request is None:
                return
            try:
                self.results.put((at, self.reply(request, at)))
            except BaseException as error:  # raised again by the thread that waits
                self.results.put((at, error))

    def reply(self, request: Request, at: int) -> T | Refusal:
        """Send a request until there is a reply, or none can be hoped for."""
        server = self.server
        give_up = float("inf")
        for tries in count(1):
            try:
                body = server.send(request.path, request.body, server.timeout_s)
                return self.read(body, at)
            except Failure as failure:
                why = failure
            if why.status in FINAL:
                if why.status == 404 and request.path == "completions":
                    why.said += " (the rows need a text to be continued, at /v1/completions)"
                raise ServerError(server.sentence("an answer", why.said))
            passing = why.status in (0, *PASSING)
            if not passing and (tries == TRIES or 400 <= why.status < 500):
                long = why.status in (400, 413, 422) and LONG.search(why.said)
                return Refusal("too_long" if long else "server_refused", why.said)
            give_up = min(give_up, time.monotonic() + server.timeout_s)
            delay = min(WAITS_S[1], WAITS_S[0] * 2 ** (tries - 1)) * random.uniform(0.5, 1.5)
            delay = max(delay, why.wait_s or 0)
            if passing and time.monotonic() + delay > give_up:
                wanted = f"an answer within {server.timeout_s:g} s"
                raise ServerAway(server.sentence(wanted, why.said))
            self.tell(why)
            if self.stopped.wait(delay):
                break
        return Refusal("server_refused", "stopped")  # nobody waits for it

    def tell(self, why: Failure) -> None:
        """Log a failure, at most every half minute."""
        with self.lock:
            if time.monotonic() - self.told < 30:
                return
            self.told = time.monotonic()
        logger.warning(
            "%s gives the %s no answer (%s); trying again for up to %g s",
            *(self.server.url, self.server.role, why.said, self.server.timeout_s),
        )


def find_server(role: Role, config: TeacherServerOptions) -> Server | None:
    """Return the server of a role, None if its model runs here.

    Raises:
        ValueError: its URL cannot be one.
        ServerError: it refuses the key, or cannot be reached and no model is named.
    """
    url: str | None = getattr(config, f"{role}_server_url")
    if not url:
        return None
    return connect(
        role,
        url,
        getattr(config, f"{role}_server_model") or None,
        concurrency=config.server_concurrency,
        timeout_s=config.server_timeout,
    )


def connect(
    role: Role, url: str, model: str | None, *, concurrency: int, timeout_s: float
) -> Server:
    """Return the server at a URL, with the name of the model that it is asked for.

    The API key is that of the environment variable LEAF_STUDENT_API_KEY or LEAF_TEACHER_API_KEY,
    else LEAF_API_KEY.

    Args:
        role: of the model.
        url: the server's, with the path of the protocol; `/v1` is added where it has no path.
        model: a name. None asks the server for its first; where it lists none, the role is sent.
        concurrency, timeout_s: as of `Server`.

    Raises:
        ValueError: the URL cannot be one, or the key cannot be sent.
        ServerError: the server refuses the key, or cannot be reached and no name is given.
    """
    key = _api_key(role)
    server = Server(
        role, checked_url(f"{role}_server_url", url), model or "", concurrency, timeout_s, key
    )
    try:
        names = server.list_models()
    except ServerAway as error:
        if model is None:
            raise
        logger.warning("%s", error)  # known answers need no server
        return server
    if model is None:
        if len(names) > 1:
            logger.warning("%s lists several models; the %s is %s", server.url, role, names[0])
        return replace(server, model=names[0] if names else role)
    if names and model not in names:
        listed = ", ".join(names[:5])
        logger.warning("%s lists %s, and not the %s %s", server.url, listed, role, model)
    return server


def key_names(role: Role) -> tuple[str, str]:
    """Return the environment variables that may hold a role's API key, the first one wins."""
    return f"LEAF_{role.upper()}_API_KEY", "LEAF_API_KEY"


def _api_key(role: Role) -> str | None:
    for name in key_names(role):
        key = os.environ.get(name, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{name}: must be printable ASCII, got other characters; set it again")
        if key:
            return key
    return None
