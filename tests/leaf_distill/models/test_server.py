"""The client of a server: what it sends, waits for, retries and reports."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
import small_server
from small_server import NAME, SmallServer, serving, status

from leaf_distill.data.example import Answer
from leaf_distill.models import server as client
from leaf_distill.models.protocol import Request, checked_url, wait_of
from leaf_distill.models.server import Server, ServerAway, ServerError, connect

QUESTIONS = [f"tom has {digit} apples ." for digit in range(10)]


@pytest.fixture(scope="module")
def shared(pair: dict[str, str]) -> Iterator[SmallServer]:
    with serving(pair["teacher"]) as running:
        yield running


@pytest.fixture
def running(shared: SmallServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallServer]:
    shared.reset()
    for name in ("LEAF_API_KEY", "LEAF_TEACHER_API_KEY", "LEAF_STUDENT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "WAITS_S", (0.01, 0.1))
    yield shared
    wait_for_threads()


def wait_for_threads() -> None:
    """Let the requests end that are in flight where a test gave the work up."""
    for thread in threading.enumerate():
        if thread.name == client.THREAD:
            thread.join(10)


def ask(text: str, *, model: str = NAME, **fields: Any) -> Request:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
    return Request("chat/completions", {"model": model, **body, **fields})


def reach(running: SmallServer, **changes: Any) -> Server:
    options: dict[str, Any] = {"concurrency": 4, "timeout_s": 5.0, **changes}
    return connect("teacher", running.url, None, **options)


def answers(server: Server, requests: list[Request], **options: Any) -> list[Answer]:
    found = dict(server.answers(requests, **options))
    return [found[at] for at in range(len(requests))]


EXPECTED = [str(digit) for digit in range(10)]


def test_every_request_has_its_own_answer(running: SmallServer) -> None:
    server = reach(running)
    assert server.model == NAME
    found = answers(server, [ask(text) for text in QUESTIONS])
    assert [one.text for one in found] == EXPECTED
    assert {one.verdict for one in found} == {None} and {one.n_tokens for one in found} == {2}
    assert list(server.answers([])) == []


def test_an_answer_at_the_limit_is_cut_off(running: SmallServer) -> None:
    (found,) = answers(reach(running), [ask(QUESTIONS[3], max_tokens=1)])
    assert found == Answer("3", 1, "cut_off")


def test_a_text_is_continued(running: SmallServer) -> None:
    body = {"model": NAME, "max_tokens": 4, "temperature": 0}
    text = f"<user> {QUESTIONS[5]} <assistant>"
    (found,) = answers(reach(running), [Request("completions", {**body, "prompt": text})])
    assert found.text == "5"


def test_an_answer_ends_before_a_text_of_stop_also_where_the_server_keeps_it(
    running: SmallServer,
) -> None:
    kept = {"choices": [{"message": {"content": "7 apples"}, "finish_reason": "length"}]}
    running.troubles = [lambda handler: handler.reply(200, kept)]
    (found,) = answers(reach(running), [ask(QUESTIONS[7], stop=[" apples"])])
    assert found == Answer("7", 0)


def test_an_answer_without_text_is_empty(running: SmallServer) -> None:
    thought = {"choices": [{"message": {"content": None, "reasoning_content": "so"}}]}
    running.troubles = [lambda handler: handler.reply(200, thought)]
    assert answers(reach(running), [ask("?")]) == [Answer("", 0)]


def test_requests_in_flight_are_bounded(running: SmallServer) -> None:
    running.delay_s = 0.05
    answers(reach(running, concurrency=3), [ask(text) for text in QUESTIONS])
    assert running.busiest == 3


@pytest.mark.parametrize(
    "trouble",
    [
        status(500),
        status(503),
        status(429),
        status(429, Retry_After="0.2"),
        status(429, Retry_After="soon"),
        small_server.dropped,
        small_server.half,
        small_server.malformed,
        small_server.pointless,
    ],
    ids=["500", "503", "429", "retry after", "bad retry after", "dropped", "half", "html", "empty"],
)
def test_what_passes_is_tried_again(running: SmallServer, trouble: Any) -> None:
    server = reach(running)
    running.troubles = [trouble] * 3
    found = answers(server, [ask(text) for text in QUESTIONS[:4]])
    assert [one.text for one in found] == EXPECTED[:4]


def test_the_wait_that_a_server_asks_for_is_kept(running: SmallServer) -> None:
    running.troubles = [status(429, Retry_After="0.5")]
    start = time.monotonic()
    answers(reach(running), [ask(QUESTIONS[0])])
    assert time.monotonic() - start >= 0.5
    assert wait_of(None) is None and wait_of("soon") is None and wait_of("-3") == 0
    assert 50 < (wait_of(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60


def test_a_server_that_starts_again_is_waited_for(pair: dict[str, str], caplog: Any) -> None:
    with serving(pair["teacher"]) as first:
        server = reach(first)
        port = first.server_address[1]
    later: list[SmallServer] = []

    def start() -> None:
        time.sleep(0.5)
        with serving(pair["teacher"], port) as second:
            later.append(second)
            done.wait(20)

    done = threading.Event()
    thread = threading.Thread(target=start)
    thread.start()
    found = answers(server, [ask(text) for text in QUESTIONS])
    done.set()
    thread.join()
    assert [one.text for one in found] == EXPECTED and len(later[0].bodies) == 10
    assert caplog.text.count("trying again") == 1


def test_a_server_that_stays_away_ends_the_work(running: SmallServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    server = Server("teacher", url, NAME, 4, 0.3)
    with pytest.raises(ServerAway, match=r"^teacher_server_url: must give an answer within 0.3 s"):
        answers(server, [ask(text) for text in QUESTIONS])
    with pytest.raises(ServerAway, match=r"list of models, .*refused"):
        connect("teacher", url, None, concurrency=1, timeout_s=1)
    assert connect("teacher", url, "a", concurrency=1, timeout_s=1).model == "a"  # logged


def test_a_server_that_says_nothing_ends_the_work(running: SmallServer) -> None:
    server = reach(running, timeout_s=0.2)
    running.troubles = [small_server.silent] * 5
    with pytest.raises(ServerAway, match=r"no answer within 0\.2 s"):
        answers(server, [ask("?")])


def test_a_server_that_is_busy_for_too_long_ends_the_work(running: SmallServer) -> None:
    running.troubles = [status(429, "over quota", Retry_After="3600")]
    with pytest.raises(ServerAway, match="status 429: over quota"):
        answers(reach(running), [ask("?")])


def test_a_wrong_key_is_said_at_once(
    running: SmallServer, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    running.key = small_server.KEY
    with pytest.raises(ServerError, match=r"status 401: the key is wrong.*LEAF_TEACHER_API_KEY"):
        connect("teacher", running.url, NAME, concurrency=1, timeout_s=5)
    monkeypatch.setenv("LEAF_API_KEY", f" {small_server.KEY}\n")
    server = reach(running)
    assert answers(server, [ask(QUESTIONS[2])])[0].text == "2"
    monkeypatch.setenv("LEAF_TEACHER_API_KEY", "another")
    with pytest.raises(ServerError, match="status 401") as error:
        reach(running)
    assert "another" not in str(error.value)
    assert small_server.KEY not in repr(server) + caplog.text
    monkeypatch.setenv("LEAF_TEACHER_API_KEY", "schlüssel")
    with pytest.raises(ValueError, match=r"^LEAF_TEACHER_API_KEY: must be printable ASCII"):
        reach(running)


def test_an_unknown_model_is_said_at_once(running: SmallServer, caplog: Any) -> None:
    server = connect("student", running.url, "other", concurrency=2, timeout_s=5)
    assert "lists tiny, and not the student other" in caplog.text
    with pytest.raises(ServerError, match=r"status 404: The model `other` does not exist"):
        answers(server, [ask(text, model="other") for text in QUESTIONS])
    assert len(running.bodies) <= 4


def test_a_redirection_is_not_followed(running: SmallServer) -> None:
    running.troubles = [status(307, Location="http://127.0.0.1:1/v1")]
    with pytest.raises(ServerError, match=r"redirects to http://127\.0\.0\.1:1/v1: give that URL"):
        answers(reach(running), [ask("?")])


def test_a_prompt_beyond_the_context_leaves_and_the_others_are_answered(
    running: SmallServer,
) -> None:
    long = ask("tom " * 60)
    found = answers(reach(running), [ask(QUESTIONS[1]), long, ask(QUESTIONS[2])])
    assert [one.verdict for one in found] == [None, "too_long", None]
    assert "maximum context length" in found[1].detail


@pytest.mark.parametrize("code", [400, 422, 500])
def test_a_refused_request_leaves_and_the_others_are_answered(
    running: SmallServer, code: int
) -> None:
    running.troubles = [status(code, "no such role")] * (client.TRIES if code == 500 else 1)
    server = reach(running, concurrency=1)
    found = answers(server, [ask(text) for text in QUESTIONS[:3]])
    assert [one.verdict for one in found] == ["server_refused", None, None]
    assert found[0].detail == f"status {code}: no such role"


def test_a_server_that_refuses_everything_ends_the_work(running: SmallServer) -> None:
    requests = [ask(text) for text in QUESTIONS * 4]
    running.troubles = [status(422, "unknown field")] * len(requests)
    with pytest.raises(ServerError, match=r"one of 20 requests, .*status 422: unknown field"):
        answers(reach(running), requests)
    wait_for_threads()
    running.troubles = [status(422, "unknown field")] * len(requests)
    found = answers(reach(running), requests, proven=True)  # the last, bad rows of a longer run
    assert {one.verdict for one in found} == {"server_refused"}


def test_answers_that_the_caller_has_not_stored_hold_back_what_is_sent(
    running: SmallServer,
) -> None:
    stream = reach(running, concurrency=3).answers([ask(text) for text in QUESTIONS])
    next(stream)
    deadline = time.monotonic() + 60
    while len(running.bodies) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(running.bodies) == 3  # one of them in the caller's hands
    assert len(list(stream)) == 9


def test_work_that_is_given_up_sends_nothing_more(running: SmallServer) -> None:
    running.delay_s = 0.05
    stream = reach(running, concurrency=2).answers([ask(text) for text in QUESTIONS])
    next(stream)
    stream.close()
    time.sleep(0.3)
    assert len(running.bodies) <= 4


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        (" https://host/v1/ ", "https://host/v1"),
        ("https://host/api/v3/chat/completions", "https://host/api/v3"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_a_url_may_lack_its_path(given: str, used: str) -> None:
    assert checked_url("x", given) == used


@pytest.mark.parametrize("given", ["localhost:8000", "ftp://host", "http://", "http://h:port", ""])
def test_what_is_no_url_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"^student_server_url: must be as http://"):
        checked_url("student_server_url", given)


@pytest.mark.parametrize("given", ["http://me:secret@host/v1", "http://host/v1?key=secret"])
def test_a_secret_in_a_url_is_refused_and_not_quoted(given: str) -> None:
    with pytest.raises(ValueError, match="LEAF_API_KEY") as error:
        checked_url("student_server_url", given)
    assert "secret" not in str(error.value)
