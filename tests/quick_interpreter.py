"""Makes Triton's interpreter faster, and compatible with every numpy."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def quicken_the_interpreter() -> None:
    """Halve the time of tests that interpret small kernels, and repair Triton under new numpy.

    At each call of a device function Triton lists all builtins of its language to replace them; the
    list never changes. Triton up to 3.6 calls int() on arrays of one element, which numpy refuses
    from 2.4 on.
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
    scope: Any = getattr(interpreter, "_LangPatchScope", None)
    if scope is not None:
        set_attr = scope.set_attr

        def set_and_mend(self: Any, target: object, name: str, value: object) -> None:
            mended = (
                (lambda tensor: int(tensor.handle.data.item())) if name == "__index__" else value
            )
            set_attr(self, target, name, mended)

        scope.set_attr = set_and_mend
