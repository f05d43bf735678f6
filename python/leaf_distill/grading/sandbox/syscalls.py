"""The system calls that a confined process may make; every other one fails with EPERM."""

from __future__ import annotations

# Pages of memory, threads, time, signals of its own, and files that Landlock lets it open. No
# sockets, no processes, no signals to others, no change of owner, mode or time of a file.
X86_64 = {
    **{"read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7},
    **{"lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13},
    **{"rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19},
    **{"writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25},
    **{"madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36},
    **{"alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60, "wait4": 61, "uname": 63},
    **{"fsync": 74, "fdatasync": 75, "ftruncate": 77, "getcwd": 79, "chdir": 80, "fchdir": 81},
    **{"rename": 82, "unlink": 87, "readlink": 89, "umask": 95, "gettimeofday": 96},
    **{"getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102},
    **{"getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111},
    **{"getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124},
    **{"rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131},
    **{"gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217},
    **{"set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229},
    **{"clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233},
    **{"waitid": 247, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "readlinkat": 267},
    **{"faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273},
    **{"get_robust_list": 274, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291},
    **{"dup3": 292, "pipe2": 293, "getcpu": 309, "renameat2": 316, "getrandom": 318},
    **{"membarrier": 324, "statx": 332, "rseq": 334, "close_range": 436, "faccessat2": 439},
}
AARCH64 = {
    **{"getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22},
    **{"dup": 23, "dup3": 24, "unlinkat": 35, "renameat": 38, "ftruncate": 46, "faccessat": 48},
    **{"chdir": 49, "fchdir": 50, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62},
    **{"read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68},
    **{"pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "fsync": 82},
    **{"fdatasync": 83, "exit": 93, "exit_group": 94, "waitid": 95, "set_tid_address": 96},
    **{"futex": 98, "set_robust_list": 99, "get_robust_list": 100, "nanosleep": 101},
    **{"getitimer": 102, "setitimer": 103, "clock_gettime": 113, "clock_getres": 114},
    **{"clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124},
    **{"restart_syscall": 128, "sigaltstack": 132, "rt_sigsuspend": 133, "rt_sigaction": 134},
    **{"rt_sigprocmask": 135, "rt_sigpending": 136, "rt_sigtimedwait": 137, "rt_sigreturn": 139},
    **{"getresuid": 148, "getresgid": 150, "times": 153, "getpgid": 155, "getsid": 156},
    **{"getgroups": 158, "uname": 160, "getrlimit": 163, "getrusage": 165, "umask": 166},
    **{"getcpu": 168, "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174},
    **{"geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214},
    **{"munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "wait4": 260},
    **{"renameat2": 276, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293},
    **{"close_range": 436, "faccessat2": 439},
}

# Allowed with some arguments only; see `confine`.
X86_64_PARTLY = {
    **{"open": 2, "openat": 257, "clone": 56, "clone3": 435, "fcntl": 72, "ioctl": 16},
    **{"prlimit64": 302, "kill": 62, "tgkill": 234},
}
AARCH64_PARTLY = {
    **{"openat": 56, "clone": 220, "clone3": 435, "fcntl": 25, "ioctl": 29},
    **{"prlimit64": 261, "kill": 129, "tgkill": 131},
}

# What the confinement itself calls, under numbers that libc has no function for.
X86_64_SETUP = {"seccomp": 317, "capset": 126, "prctl": 157}
AARCH64_SETUP = {"seccomp": 277, "capset": 91, "prctl": 167}
LANDLOCK = {"create_ruleset": 444, "add_rule": 445, "restrict_self": 446}  # on both

MACHINES = {
    "x86_64": (0xC000003E, X86_64, X86_64_PARTLY, X86_64_SETUP),
    "aarch64": (0xC00000B7, AARCH64, AARCH64_PARTLY, AARCH64_SETUP),
}
"""By the name of the machine: its number in seccomp, and the system calls."""
