"""How a confined process ended, and what that says of its program."""

from __future__ import annotations

import signal
from dataclasses import dataclass

FILE_BYTES = 16 << 20  # of a file, and of all files in the directory
THREADS = 64
DIRECTORY_FILES = 1000
TOO_MANY = {
    "threads": f"the program had more than {THREADS} threads",
    "files": f"the program wrote more than {DIRECTORY_FILES} files or {FILE_BYTES >> 20} MB",
}
PROCESSOR_TIME = "s of processor time"
ENDED = "the system ended the program"
CLOCK_S = 0.1  # by which two clocks of processor time may differ


def wall_limit(cpu_s: float) -> float:
    """Return the wall time for so much processor time, on a machine that others use too."""
    return 5.0 + 3.0 * cpu_s


@dataclass
class End:
    """How a process ended.

    Attributes:
        status: its exit status, or the negated number of the signal that ended it.
        cpu_s: processor time, user and system.
        memory: the most bytes that it had in memory.
        reason: why it was ended from outside: "timeout", "threads", "files", or "silent" where it
            gave up its connection but went on; else "".
    """

    status: int = 0
    cpu_s: float = 0.0
    memory: int = 0
    reason: str = ""

    def verdict(self, cpu_limit_s: float) -> tuple[str, str]:
        """Return the verdict on a program that ended before its tests did, and a sentence."""
        if self.reason in ("threads", "files"):
            return "refused", TOO_MANY[self.reason]
        # It may have caught the signal.
        if self.status == -signal.SIGXCPU or self.cpu_s > cpu_limit_s - CLOCK_S:
            return "timeout", f"the program took more than {cpu_limit_s:.0f} {PROCESSOR_TIME}"
        if self.reason == "timeout":
            return "timeout", f"the program took more than {wall_limit(cpu_limit_s):.0f} s"
        if self.reason == "silent":
            return "error", "the program closed its connection"
        if self.status == -signal.SIGKILL:
            return "memory", ENDED
        if self.status < 0:
            return "error", f"the program was ended by {signal.Signals(-self.status).name}"
        return "error", f"the program ended itself with exit status {self.status}"


def depends_on_load(detail: str) -> bool:
    """Return whether a verdict may be another one on a less busy machine."""
    timed = "the program took more than" in detail and PROCESSOR_TIME not in detail
    return timed or ENDED in detail
