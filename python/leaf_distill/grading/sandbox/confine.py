"""Takes a process's own rights away: Landlock for files, seccomp for all else, and limits."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable, Sequence

from .syscalls import LANDLOCK, MACHINES

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SECCOMP_SET_MODE_FILTER = 1
CAPABILITY_VERSION_3 = 0x20080522

# Landlock's rights on files, by bit.
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << bit for bit in (1, 2, 3, 5, 8, 14)
)
RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # the number of rights; 16 from ABI 5 on
NETWORK_RIGHTS = 3  # bind and connect, from ABI 4 on
SCOPES = 3  # abstract sockets and signals, from ABI 6 on

FILES = 32  # open at once
STACK_BYTES = 96 << 20  # the kernel keeps 128 MB free below the stack, whatever the limit was

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """Return the version of Landlock that the kernel has, 0 where it has none."""
    return max(0, int(_libc.syscall(LANDLOCK["create_ruleset"], None, ctypes.c_size_t(0), 1)))


def confine(
    directory: str,
    readable: Iterable[str],
    *,
    memory: int,
    file_bytes: int,
    cpu_s: int,
    parent: int,
) -> None:
    """Confine this process, for good.

    Afterwards it can read `readable`, create, write and delete plain files in `directory`, compute,
    and start threads. It can do nothing else: no other file, socket, process or device.

    Args:
        directory: its own directory.
        readable: files and directories that it may read; those that do not exist are left out.
        memory: bytes of address space.
        file_bytes: bytes of a file.
        cpu_s: seconds of processor time, after which the kernel ends it.
        parent: the process with which it ends too.

    Raises:
        OSError: the kernel refuses a step; nothing may be run then.
    """
    setup = MACHINES[platform.machine()][3]
    _call(setup["prctl"], PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before it could take this process with it
    _call(setup["prctl"], PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        # The processor's soft limit sends a signal that can be caught; a second later none can.
        above = value + 1 if limit == resource.RLIMIT_CPU else value
        if hard != resource.RLIM_INFINITY:
            value, above = min(value, hard), min(above, hard)
        resource.setrlimit(limit, (value, above))
    # Root without capabilities owns root's files, and no more.
    header, none = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    _call(setup["capset"], ctypes.c_char_p(header), ctypes.c_char_p(none))
    _restrict_files(directory, readable)
    _restrict_calls(setup["seccomp"])


def _call(number: int, *arguments: object) -> int:
    words = (ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)
    result = int(_libc.syscall(number, *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"system call {number}")
    return result


def _restrict_files(directory: str, readable: Iterable[str]) -> None:
    abi = landlock_abi()
    if not abi:
        raise OSError(errno.ENOSYS, "the kernel has no Landlock")
    handled = (1 << RIGHTS_BY_ABI.get(abi, 16)) - 1
    fields = [handled, *([NETWORK_RIGHTS] if abi >= 4 else []), *([SCOPES] if abi >= 6 else [])]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    create = LANDLOCK["create_ruleset"]
    ruleset = _call(create, ctypes.c_char_p(attributes), len(attributes), 0)
    own = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    rules = [(directory, own), *((path, READ_FILE | READ_DIR) for path in readable)]
    rules.append((os.devnull, READ_FILE | WRITE_FILE))
    for path, rights in rules:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE
        rule = struct.pack("=Qi", rights & handled, beneath)
        _call(LANDLOCK["add_rule"], ruleset, 1, ctypes.c_char_p(rule), 0)
        os.close(beneath)
    _call(LANDLOCK["restrict_self"], ruleset, 0)
    os.close(ruleset)


# The classic BPF of seccomp: code, and where to jump if true or false.
LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, MACHINE = 0, 4  # where the call's number and the machine's stand

CLONE_SHARED = 0x00010F00  # a thread: memory, file system, files and signals are shared
TMPFILE = 0x400000
CLONE_NEW = 0x7E020000  # namespaces
# Nothing that sends signals (F_SETOWN, O_ASYNC's owner) or locks other files.
FCNTL = (0, 1, 2, 3, 4, 1030)  # duplicate, get and set flags, duplicate and close at exec
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # of terminals and pipes, what isatty asks

Instruction = tuple[int, int, int, int]


def _restrict_calls(seccomp: int) -> None:
    number, allowed, partly, _ = MACHINES[platform.machine()]
    program = [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 1, 0, number),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if platform.machine() == "x86_64":  # the numbers of the x32 ABI
        program += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    for call in allowed.values():
        program += [(EQUAL, 0, 1, call), (RETURN, 0, 0, ALLOW)]
    for name, call in partly.items():
        body = _condition(name)
        program += [(EQUAL, 0, len(body), call), *body]
    program.append((RETURN, 0, 0, FAIL | errno.EPERM))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    description = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _call(seccomp, SECCOMP_SET_MODE_FILTER, 0, ctypes.c_char_p(description))


def _condition(name: str) -> list[Instruction]:
    """Return the instructions that decide about one call by its arguments."""
    yes, no = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL | errno.EPERM)
    if name == "clone3":  # its arguments are out of reach; libc then takes clone
        return [(RETURN, 0, 0, FAIL | errno.ENOSYS)]
    if name == "clone":
        return [
            _argument(0),
            (ANY_BIT, 0, 1, CLONE_NEW),
            no,
            (AND, 0, 0, CLONE_SHARED),
            (EQUAL, 0, 1, CLONE_SHARED),
            yes,
            no,
        ]
    if name in ("open", "openat"):
        # Before Landlock's ABI 3, a file that is not opened for writing could be truncated. Files
        # without a name would not be seen in the directory.
        flags = _argument(1 if name == "open" else 2)
        return [
            flags,
            (ANY_BIT, 0, 1, TMPFILE),
            no,
            (AND, 0, 0, os.O_ACCMODE),
            (EQUAL, 0, 1, os.O_ACCMODE),
            no,
            (EQUAL, 1, 0, os.O_RDONLY),
            yes,
            flags,
            (ANY_BIT, 0, 1, os.O_TRUNC),
            no,
            yes,
        ]
    if name == "prlimit64":  # its own limits alone
        return [_argument(0), (EQUAL, 0, 1, 0), yes, no]
    if name in ("kill", "tgkill"):
        return [_argument(0), (EQUAL, 0, 1, os.getpid()), yes, no]
    return [_argument(1), *_any_of(FCNTL if name == "fcntl" else IOCTL), no]


def _argument(index: int) -> Instruction:
    """Load the lower half of an argument: all that the kernel reads of an int."""
    return (LOAD, 0, 0, 16 + 8 * index)


def _any_of(values: Sequence[int]) -> list[Instruction]:
    return [step for value in values for step in ((EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW))]
