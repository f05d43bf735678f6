"""Programs with one fault: what a grader must refuse wherever the tests can see it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from random import Random

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.USub: ast.UAdd,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
NAMES = {"max": "min", "min": "max", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil"}
Change = Callable[[], None]


def mutants(program: str, seed: int) -> Iterator[str]:
    """Yield the program with one change each, in an order that the seed decides.

    Args:
        program: Python source.
        seed: of the order. Results that are lost come last: any test sees them.
    """
    tree = ast.parse(program)
    plain, (small, lost) = ast.unparse(tree), _changes(tree)
    random = Random(seed)
    order = random.sample(range(len(small)), len(small))
    for index in [*order, *range(len(small), len(small) + len(lost))]:
        tree = ast.parse(program)
        small, lost = _changes(tree)
        [*small, *lost][index]()
        changed = ast.unparse(ast.fix_missing_locations(tree))
        if changed != plain:
            yield changed


def _changes(tree: ast.Module) -> tuple[list[Change], list[Change]]:
    """Return the small changes that can be made in a tree, and the losses of a result."""
    small, lost = [], []
    unread = {id(part) for node in ast.walk(tree) for part in _without_effect(node)}
    for node in ast.walk(tree):
        if id(node) not in unread:
            small += _small_changes(node)
        if isinstance(node, ast.Return) and node.value is not None:
            lost.append(partial(setattr, node, "value", ast.Constant(None)))
    return small, lost


def _without_effect(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what no test sees: docstrings and annotations."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        yield node.value
    for name in ("annotation", "returns"):
        if isinstance(part := getattr(node, name, None), ast.AST):
            yield from ast.walk(part)


def _small_changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp | ast.UnaryOp):
        if type(node.op) in OPERATORS:
            yield partial(setattr, node, "op", OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            yield partial(node.ops.__setitem__, at, OPERATORS[type(operator)]())
    elif isinstance(node, ast.Constant):
        if (value := _other(node.value)) is not None:
            yield partial(setattr, node, "value", value)
    elif isinstance(node, ast.If | ast.IfExp):
        yield partial(setattr, node, "test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Call):
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
        if name in NAMES:
            field = "id" if isinstance(node.func, ast.Name) else "attr"
            yield partial(setattr, node.func, field, NAMES[name])
        if name == "range":  # one too many or too few, by the place of the argument
            last = ast.BinOp(node.args[-1], ast.Add(), ast.Constant(1))
            yield partial(node.args.__setitem__, -1, last)


def _other(value: object) -> object:
    """Return another value of a constant's type, or None."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "x" if isinstance(value, str) else None
