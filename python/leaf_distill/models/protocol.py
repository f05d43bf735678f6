"""One request of the OpenAI protocol: what is sent, and what the response says.

Only fields that vLLM, SGLang, llama.cpp and `transformers serve` all take are sent; the standard
library is the client.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from leaf_distill.data.example import Answer

SAID = 300  # characters of a server's message that are quoted


class Request(NamedTuple):
    """A path below the server's URL, and the JSON that is sent there."""

    path: str
    body: dict[str, Any]


class Failure(Exception):
    """No answer.

    Attributes:
        status: of the response; 0 without one, 200 for one that is no answer.
        said: the reason, in the server's words where it gave some.
        wait_s: the seconds after which the server wants to be asked again.
    """

    def __init__(self, status: int, said: str, wait_s: float | None = None) -> None:
        super().__init__(said)
        self.status, self.said, self.wait_s = status, said, wait_s


def send(
    url: str, path: str, body: Mapping[str, Any] | None, *, api_key: str | None, timeout_s: float
) -> Any:
    """Return the JSON of one response.

    Args:
        url, path: where it is sent; a redirection is not followed.
        body: what is posted; None gets.
        api_key: sent as a bearer token.
        timeout_s: the longest silence of the server.

    Raises:
        Failure: there is no response, or it is an error or no JSON.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "leaf"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(f"{url}/{path}", data=data, headers=headers)
        with _OPENER.open(request, timeout=timeout_s) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        with error:
            raise _failure(error) from None
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            reason = f"no answer within {timeout_s:g} s"
        raise Failure(0, str(reason) or type(reason).__name__) from None
    try:
        return json.loads(text)
    except ValueError:
        raise Failure(200, f"no JSON but {text[:80]!r}") from None


def read_answer(body: Any, request: Request) -> Answer:
    """Return the answer in the JSON of a response, with the verdict None or "cut_off".

    Raises:
        Failure: there is none.
    """
    try:
        choice = body["choices"][0]
        text = choice["text"] if request.path == "completions" else choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Failure(200, f"no answer but {json.dumps(body):.{SAID}}") from None
    text = "" if text is None else text  # an answer of thoughts or tool calls alone
    if not isinstance(text, str):
        raise Failure(200, f"no text but {json.dumps(text):.{SAID}}")
    verdict = "cut_off" if choice.get("finish_reason") == "length" else None
    ends = [at for stop in request.body.get("stop", ()) if (at := text.find(stop)) >= 0]
    if ends:  # from a server that keeps the text which ends an answer
        text, verdict = text[: min(ends)], None
    usage = body.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else 0
    return Answer(text, tokens if isinstance(tokens, int) else 0, verdict)


def read_models(body: Any) -> list[str]:
    """Return the names in a list of models."""
    entries = body.get("data") if isinstance(body, Mapping) else None
    entries = entries if isinstance(entries, list) else []
    names = [one.get("id") for one in entries if isinstance(one, Mapping)]
    return [name for name in names if isinstance(name, str) and name]


def checked_url(argument: str, url: str) -> str:
    """Return a server's URL without a last slash; `/v1` is added where it has no path.

    Raises:
        ValueError: it cannot be one, or holds what must not be written beside results.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ValueError(f"{argument}: must be as http://HOST:PORT/v1, got {url!r}; give the URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"{argument}: must have no user, password or query, for it is written beside the "
            "results; a key is read from the environment variable LEAF_API_KEY"
        )
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(ending)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would lose its content, and might take the key to another host."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


_OPENER: Final = urllib.request.build_opener(_NoRedirect)


def _failure(error: urllib.error.HTTPError) -> Failure:
    """Return what a response of an error says."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    said = " ".join((_message(text) or str(error.reason)).split())
    said = said if len(said) <= SAID else f"{said[:SAID]}..."
    if 300 <= error.code < 400:
        said = f"it redirects to {error.headers.get('Location')}: give that URL; {said}"
    return Failure(
        error.code, f"status {error.code}: {said}", wait_of(error.headers.get("Retry-After"))
    )


def _message(text: str) -> str:
    """Return the sentence in the JSON of an error, else the text."""
    try:
        value: Any = json.loads(text)
    except ValueError:
        return text
    for name in ("error", "detail", "message"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return value if isinstance(value, str) else json.dumps(value)


def wait_of(given: str | None) -> float | None:
    """Return the seconds that a header Retry-After asks for, a number or a date."""
    if given is None:
        return None
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
