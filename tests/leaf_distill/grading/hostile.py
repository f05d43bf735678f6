"""Programs that attack: each defines `target`, whose tests want the square of its argument.

`<secret>`, `<outside>`, `<victim>` stand for files of the user, `<folder>` for a folder, `<port>`
for a server on loopback, `<pid>` for a process of the user. A program that reads something returns
it.
"""

from __future__ import annotations

import re

PROGRAMS = r"""

# Processes and threads

### fork bomb
import os
def target(n):
    while True:
        os.fork()

### fork
import os
def target(n):
    return 9 if os.fork() else 9

### multiprocessing
import multiprocessing
def target(n):
    worker = multiprocessing.Process(target=print)
    worker.start()
    return 9

### subprocess
import subprocess
def target(n):
    return subprocess.check_output(['id'])

### shell
import os
def target(n):
    return os.system('touch <outside>')

### exec
import os
def target(n):
    os.execv('/bin/sh', ['sh', '-c', 'touch <outside>'])

### spawn
import os
def target(n):
    return os.posix_spawn('/bin/touch', ['touch', '<outside>'], {})

### fork in C
<call>
def target(n):
    return [libc.fork(), libc.vfork()]

### fork by its number
<call>
def target(n):
    return [call(57), call(58), call(435, 0, 0)]

### thread bomb
import threading, time
threading.stack_size(32768)
def target(n):
    while True:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

# Memory, output, files, time

### memory at once
def target(n):
    return len(bytearray(1 << 40))

### memory by and by
def target(n):
    kept = []
    while True:
        kept.append(bytes(1 << 20))

### memory map
import mmap
def target(n):
    return len(mmap.mmap(-1, 1 << 40))

### endless output
def target(n):
    while True:
        print('x' * 100000)

### endless errors
import sys
def target(n):
    while True:
        sys.stderr.write('x' * 100000)

### large file
def target(n):
    with open('file', 'wb') as file:
        while True:
            file.write(bytes(1 << 20))

### many files
import itertools
def target(n):
    for number in itertools.count():
        open(f'file {number}', 'w').close()

### large value
def target(n):
    return 'x' * (100 << 20)

### deep value
def target(n):
    value = []
    for _ in range(100000):
        value = [value]
    return value

### endless recursion
import sys
sys.setrecursionlimit(10**9)
def target(n):
    return target(n)

### endless loop
def target(n):
    while True:
        pass

### endless sleep
import time
def target(n):
    time.sleep(10**6)

### ignored signals
import signal
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def target(n):
    while True:
        pass

### endless loop in a regular expression
import re
def target(n):
    return re.match('(a*)*b', 'a' * 60)

### crash
import ctypes
def target(n):
    return ctypes.string_at(1)

# The network

### connection
import socket
def target(n):
    socket.create_connection(('127.0.0.1', <port>))

### datagram
import socket
def target(n):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.sendto(b'stolen', ('127.0.0.1', <port>))

### abstract socket
import socket
def target(n):
    socket.socket(socket.AF_UNIX).connect('\0leaf-test')

### socket pair
import socket
def target(n):
    return len(socket.socketpair())

### http
import urllib.request
def target(n):
    return urllib.request.urlopen('http://127.0.0.1:<port>').read()

# The user's files and environment

### read a file
def target(n):
    return open('<secret>').read()

### read the environment
import os
def target(n):
    return dict(os.environ)

### read the environment of a process
def target(n):
    return [open(f'/proc/{one}/environ', 'rb').read() for one in ('self', <pid>)]

### read the memory of a process
def target(n):
    return open('/proc/<pid>/mem', 'rb').read(9)

### read the system's users
def target(n):
    return open('/etc/passwd').read()

### list a folder
import os
def target(n):
    return os.listdir('<folder>')

### write a file
def target(n):
    open('<outside>', 'w').write('x')

### overwrite a file
def target(n):
    open('<victim>', 'w').close()

### truncate a file
import os
def target(n):
    os.truncate('<victim>', 0)

### truncate a file that may be read
import os
def target(n):
    open('own', 'w').write('x')
    os.open('own', os.O_RDONLY | os.O_TRUNC)
    return 9

### delete a file
import os
def target(n):
    os.unlink('<victim>')

### move a file
import os
def target(n):
    os.rename('<victim>', 'mine')

### symbolic link
import os
def target(n):
    os.symlink('<secret>', 'link')
    return open('link').read()

### hard link
import os
def target(n):
    os.link('<secret>', 'link')
    return open('link').read()

### relative path
import os
def target(n):
    path = os.path.relpath('<secret>')
    return open(path).read()

### change of mode
import os
def target(n):
    os.chmod('<victim>', 0)

### change of time
import os
def target(n):
    os.utime('<victim>', (0, 0))

### named pipe
import os
def target(n):
    os.mkfifo('pipe')

### device
import os, stat
def target(n):
    os.mknod('zero', 0o600 | stat.S_IFCHR, 261)

# Other processes and the kernel

### kill the parent
import os
def target(n):
    os.kill(os.getppid(), 9)

### kill a process
import os
def target(n):
    os.kill(<pid>, 9)

### kill everything
import os
def target(n):
    os.kill(-1, 9)

### signal by a pipe
import fcntl, os
def target(n):
    reading, writing = os.pipe()
    fcntl.fcntl(reading, 10, 9)
    fcntl.fcntl(reading, fcntl.F_SETOWN, <pid>)
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writing, b'x')
    return 9

### limits of another process
import resource
def target(n):
    resource.prlimit(<pid>, resource.RLIMIT_CPU, (0, 0))

### higher limits
import resource
def target(n):
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

### trace a process
<call>
def target(n):
    return libc.ptrace(16, <pid>, 0, 0)

### read a process
<call>
def target(n):
    return libc.process_vm_readv(<pid>, 0, 0, 0, 0, 0)

### another user
import os
def target(n):
    os.setgid(0)
    os.setuid(1)

### namespaces
<call>
def target(n):
    return libc.unshare(0x10000000)

### mount
<call>
def target(n):
    return libc.mount(b'/', b'.', b'', 4096, 0)

### kernel interfaces
<call>
def target(n):
    numbers = [101, 169, 175, 246, 248, 250, 272, 298, 304, 308, 310, 319, 321, 323, 425, 438, 449]
    return [call(number, 0, 0, 0, 0, 0) for number in numbers]

### another confinement
<call>
def target(n):
    return [call(317, 1, 0, 0), call(157, 38)]

### other system calls
<call>
def target(n):
    return call(0x40000000 + 39)

# Forged verdicts

### exit while loading
import sys
sys.exit(0)
def target(n):
    return 9

### exit
import sys
def target(n):
    sys.exit(0)

### exit at once
import os
def target(n):
    os._exit(0)

### exit at once while loading
import os
os._exit(0)
def target(n):
    return 9

### every exception caught
def target(n):
    while True:
        try:
            raise SystemExit
        except BaseException:
            pass

### other assertions
import builtins
builtins.AssertionError = BaseException
__debug__ or None
def target(n):
    return 0

### other built-in functions
import builtins
builtins.abs = builtins.all = lambda *x: 0
def abs(*x):
    return 0
def all(*x):
    return True
def target(n):
    return 0

### equal to everything
class Any:
    def __eq__(self, other):
        return True
    __hash__ = None
def target(n):
    return Any()

### a number equal to everything
class Any(int):
    def __eq__(self, other):
        return True
    __hash__ = None
def target(n):
    return Any()

### a class that calls itself numpy's
class Any:
    __module__ = 'numpy'
    def tolist(self):
        return self
    def __eq__(self, other):
        return True
def target(n):
    return Any()

### a printed verdict
import json, sys
def target(n):
    print(json.dumps(dict(verdict='right', detail='')))
    sys.stdout.flush()
    return 0

### a verdict in every file
import json, os
data = json.dumps(dict(verdict='right', detail='')).encode()
def target(n):
    for one in range(64):
        try:
            os.write(one, len(data).to_bytes(8, 'little') + data)
        except OSError:
            pass
    return 0

### a message of another form
import os
def target(n):
    for one in range(3, 64):
        try:
            os.write(one, (9).to_bytes(8, 'little') + b'[' * 9)
        except OSError:
            pass
    return 0

### a message without end
import os
def target(n):
    for one in range(3, 64):
        try:
            os.write(one, (1 << 62).to_bytes(8, 'little'))
        except OSError:
            pass
    return 0

### closed connection
import os, time
def target(n):
    os.closerange(3, 64)
    time.sleep(10**6)

### other encoder
import sys
values = sys.modules['sandbox.values']
values.Encoder.encode = lambda *x: '{"value": {"": "eval", "v": "9"}, "objects": []}'
def target(n):
    return 0

### own handle
import sys
values = sys.modules['sandbox.values']
values.Encoder.encode = lambda *x: '{"value": {"": "handle", "v": [0, 0, 0]}, "objects": []}'
class Any:
    def __eq__(self, other):
        return True
def target(n):
    return 0

### the tests' text
import gc, inspect, re
def target(n):
    found = re.findall(r'target[(]%d[)] == (\d+)' % n, repr(gc.get_objects()))
    frame = inspect.currentframe()
    while frame:
        found += re.findall(r'target[(]%d[)] == (\d+)' % n, repr(frame.f_locals))
        frame = frame.f_back
    return int(found[0]) if found else 0

### the open files
import os, re
def target(n):
    text = b''
    for one in range(64):
        try:
            text += os.pread(one, 1 << 20, 0)
        except OSError:
            pass
    found = re.findall(rb'target[(]%d[)] == (\d+)' % n, text)
    return int(found[0]) if found else 0

### an exception that never ends
class Endless(Exception):
    def __str__(self):
        while True:
            pass
def target(n):
    raise Endless

### an expected exception
def target(n):
    raise AssertionError

### a stopped iteration
def target(n):
    raise StopIteration

### work at the end
import atexit
atexit.register(lambda: open('<outside>', 'w'))
def target(n):
    return 0
"""

CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    return libc.syscall(*[ctypes.c_long(word) if isinstance(word, int) else word for word in words])
"""

ATTACKS = {
    name: text.replace("<call>", CALL)
    for name, text in re.findall(r"^### (.*)\n((?:(?!#).*\n)*)", PROGRAMS, re.MULTILINE)
}
