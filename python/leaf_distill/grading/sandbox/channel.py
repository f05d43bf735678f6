"""Messages over a pair of pipes: eight bytes of length, then JSON."""

from __future__ import annotations

import json
import os
from typing import Any

LONGEST = 64 << 20  # bytes of a message


class Gone(BaseException):
    """The other side has ended. No `except Exception` of a test catches it."""


class Unreadable(BaseException):
    """The other side has sent something that is no message."""


class TooLong(Exception):
    """A message would be longer than the other side reads."""


class Channel:
    """One end of a two-way connection, of two file descriptors."""

    def __init__(self, receive: int, send: int) -> None:
        self._receive, self._send = receive, send

    def put(self, message: Any) -> None:
        """Send a message; Gone where nobody reads, TooLong for one of more than 64 MB."""
        data = json.dumps(message).encode()
        if len(data) > LONGEST:
            raise TooLong("a value has more than 64 MB")
        view = memoryview(len(data).to_bytes(8, "little") + data)
        try:
            while view:
                view = view[os.write(self._send, view) :]
        except OSError as error:
            raise Gone from error

    def get(self) -> Any:
        """Wait for a message; Gone where none comes, Unreadable where it is none."""
        length = int.from_bytes(self._exactly(8), "little")
        if length > LONGEST:
            raise Unreadable("its reply is no message")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise Unreadable("its reply is no message") from error

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self._receive, min(count, 1 << 20))
            if not part:
                raise Gone
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
