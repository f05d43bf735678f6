"""Triton's interpreter, without looking for the same functions over and over."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def quicken_the_interpreter() -> None:
    """Halves the time of tests that interpret small kernels; changes nothing else.

    At each call of a device function Triton lists all of its language's builtins in order to
    replace them. The list is always the same.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(package: Any) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in inspect.getmembers(package) if tl.core.is_builtin(m)]

    def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins_of(package):
            if getattr(package, name) is member:
                interpreter._patch_attr(package, name, member, builder, scope)

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = patch_builtins
