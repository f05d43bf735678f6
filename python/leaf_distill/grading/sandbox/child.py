"""A confined process: confines itself, then serves a program, runs a script, or judges."""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any

from .channel import Channel
from .confine import confine
from .judge import judge
from .serve import run_script, serve


class _Packages:
    """Finds the packages that a program may import beside the standard library."""

    def __init__(self, directories: Mapping[str, str]) -> None:
        self.directories = directories

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        directory = self.directories.get(name)
        if directory is None or path is not None:
            return None
        file = f"{directory}/__init__.py"
        return spec_from_file_location(name, file, submodule_search_locations=[directory])


def main() -> None:
    """Do the job in the file that the first argument names; all arguments are descriptors."""
    given, started, *rest = map(int, sys.argv[1:])
    with open(given, "rb") as file:
        job: dict[str, Any] = json.load(file)
    sys.argv[:] = [""]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as `site` has them
    sys.meta_path.append(_Packages(job["packages"]))
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # a program is right also where its answer is long
    try:
        confine(**job["limits"])
    except BaseException as error:
        os.write(started, f"{type(error).__name__}: {error}".encode())
        os._exit(1)  # nothing of the program has run
    os.write(started, b"confined")
    os.close(started)
    if job["role"] == "script":
        return run_script(job)  # and end as any script does
    if job["role"] == "program":
        serve(job, Channel(*rest))
    else:
        *ends, result = rest
        data = json.dumps(judge(job, Channel(*ends))).encode()
        if len(data) > job["limits"]["file_bytes"]:
            told = {"verdict": "bad_tests", "detail": "the reference's values are too large"}
            data = json.dumps(told).encode()
        while data:
            data = data[os.write(result, data) :]
    os._exit(0)
