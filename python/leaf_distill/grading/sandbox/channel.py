"""Messages over a pair of pipes: eight bytes of length, then JSON."""

from __future__ import annotations

import json
import os
from typing import Any

LONGEST = 64 << 20  # bytes of a message


class Gone(BaseException):
    """The other side has ended, or says too much. No `except Exception` of a test catches it."""


class Channel:
    """One end of a two-way connection, of two file descriptors."""

    def __init__(self, receive: int, send: int) -> None:
        self._receive, self._send = receive, send

    def put(self, message: Any) -> None:
        """Send a message; Gone where nobody reads."""
        data = json.dumps(message).encode()
        if len(data) > LONGEST:
            raise Gone("a value has more than 64 MB")
        view = memoryview(len(data).to_bytes(8, "little") + data)
        try:
            while view:
                view = view[os.write(self._send, view) :]
        except OSError as error:
            raise Gone("it has ended") from error

    def get(self) -> Any:
        """Wait for a message; Gone where none comes, or none that is one."""
        length = int.from_bytes(self._exactly(8), "little")
        if length > LONGEST:
            raise Gone("a value has more than 64 MB")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise Gone("its reply is no message") from error

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self._receive, min(count, 1 << 20))
            if not part:
                raise Gone("it has ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
