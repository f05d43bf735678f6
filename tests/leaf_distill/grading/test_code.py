"""Programs are found in answers, run against every form of tests, and judged by their values."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.tests import Tests
from leaf_distill.grading.code import CodeGrader, same_output
from leaf_distill.grading.program import find_program
from leaf_distill.grading.sandbox.compare import same
from leaf_distill.grading.sandbox.process import SandboxError, unavailable
from leaf_distill.grading.sandbox.values import Encoder, NotData, decode

confined = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

ADD = Tests("asserts", code=("assert add(1, 2) == 3", "assert add(-1, 1) == 0"))
CALLS = Tests("calls", entry_point="add", inputs=("(1, 2)", "(-1, 1)"), outputs=("3", "0"))
METHOD = replace(CALLS, entry_point="Solution().add")
HEAD = 'def add(a, b):\n    """Return the sum."""\n'
PREFIX = replace(CALLS, prefix=HEAD)
SCRIPT = Tests("stdin", inputs=("1 2\n",), outputs=("3\n",))


@pytest.fixture(scope="module")
def grader() -> Iterator[CodeGrader]:
    with CodeGrader(timeout_s=2.0) as grader:
        yield grader


def verdict(grader: CodeGrader, tests: Tests, answer: str) -> str:
    return grader.grade([(tests, answer)])[0].verdict


RIGHT = "def add(a, b):\n    return a + b"


ANSWERS = {
    "code alone": (ADD, RIGHT),
    "a block": (ADD, f"Here it is:\n```python\n{RIGHT}\n```\nIt adds."),
    "a block without a language": (CALLS, f"```\n{RIGHT}\n```"),
    "a block with tildes": (CALLS, f"~~~python\n{RIGHT}\n~~~"),
    "a block that does not end": (CALLS, f"Sure!\n```python\n{RIGHT}"),
    "a block in a list": (
        CALLS,
        "1. Add:\n\n   ```python\n   def add(a, b):\n      return a+b\n   ```",
    ),
    "windows' line ends": (CALLS, f"```python\n{RIGHT}\n```".replace("\n", "\r\n")),
    "the last of two": (
        CALLS,
        f"```python\ndef add(a, b):\n    return 0\n```\nBetter:\n```python\n{RIGHT}\n```",
    ),
    "an example of its use comes last": (
        CALLS,
        f"```python\n{RIGHT}\n```\nUse it so:\n```python\nprint(add(1, 2))\n```",
    ),
    "output comes last": (CALLS, f"```python\n{RIGHT}\n```\nwhich prints\n```text\n3\n```"),
    "prose without a block": (ADD, f"The function is:\n\n{RIGHT}\n\nIt returns the sum of both."),
    "after a thought": (CALLS, f"<think>```python\nadd = None\n```</think>\n{RIGHT}"),
    "a lambda": (CALLS, "```python\nadd = lambda a, b: a + b\n```"),
    "a main block and a demonstration": (
        CALLS,
        f"```python\n{RIGHT}\n\nif __name__ == '__main__':\n    print(add(int(input()), 2))\n```",
    ),
    "imports and helpers": (
        ADD,
        "```python\nfrom functools import reduce\n\ndef plus(*all):\n"
        "    return reduce(lambda x, y: x + y, all)\n\ndef add(a, b):\n    return plus(a, b)\n```",
    ),
    "a class": (METHOD, "class Solution:\n    def add(self, a, b):\n        return a + b"),
    "a class for a function": (
        CALLS,
        "class Solution:\n    def add(self, a, b):\n        return a+b",
    ),
    "the rest of a function": (PREFIX, "    return a + b\n\nThis adds both."),
    "the rest of a function in a block": (PREFIX, "```python\n    return a + b\n```"),
    "the whole function for a head": (PREFIX, f"```python\n{RIGHT}\n```"),
    "sorted containers and numpy": (
        ADD,
        "import numpy as np\nfrom sortedcontainers import SortedList\ndef add(a, b):\n"
        "    return np.sum(np.array(list(SortedList([a, b]))))",
    ),
    "a script": (SCRIPT, "```python\na, b = map(int, input().split())\nprint(a + b)\n```"),
    "a script without a fence": (
        SCRIPT,
        "for line in open(0):\n    print(sum(map(int, line.split())))",
    ),
    "an imported function": (CALLS, "```python\nfrom operator import add\n```"),
    "a function that exec defines": (CALLS, "```python\nexec('def add(a, b): return a + b')\n```"),
    "a function under a condition": (
        CALLS,
        "```\nif True:\n    def add(a, b):\n        return a+b\n```",
    ),
    "the rest of a function that begins with a loop": (
        PREFIX,
        "```python\n    for _ in range(1):\n        return a + b\n```",
    ),
    "a script with main": (
        SCRIPT,
        "import sys\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\n"
        "if __name__ == '__main__':\n    main()",
    ),
    "a script in a thread": (
        SCRIPT,
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
        "def main():\n    print(sum(map(int, input().split())))\n"
        "threading.Thread(target=main).start()",
    ),
    "a script that ends itself": (
        SCRIPT,
        "import sys\nprint(sum(map(int, input().split())))\nsys.exit()",
    ),
}


@confined
@pytest.mark.parametrize("name", ANSWERS)
def test_a_program_is_found_however_it_is_written(grader: CodeGrader, name: str) -> None:
    tests, answer = ANSWERS[name]
    assert grader.grade([(tests, answer)])[0] == ("right", "")


NONE = {
    "nothing": (ADD, ""),
    "prose": (ADD, "I cannot solve this. The answer is 3."),
    "another function": (CALLS, "```python\ndef plus(a, b):\n    return a + b\n```"),
    "a class without the method": (METHOD, "class Solution:\n    def plus(self):\n        pass"),
    "prose for a script": (SCRIPT, "Add the two numbers."),
}


@confined
@pytest.mark.parametrize("name", NONE)
def test_an_answer_without_the_entry_point_has_no_program(grader: CodeGrader, name: str) -> None:
    tests, answer = NONE[name]
    judged = grader.grade([(tests, answer)])[0]
    assert judged.verdict == "no_program" and judged.detail


FAILING = {
    "wrong": (
        ADD,
        "def add(a, b):\n    return a - b",
        "wrong",
        "assert add(1, 2) == 3: it returned -1",
    ),
    "wrong value": (CALLS, "def add(a, b):\n    return 3", "wrong", "add(-1, 1): it must return 0"),
    "error": (
        ADD,
        "def add(a, b):\n    return [][1]",
        "error",
        "IndexError: list index out of range",
    ),
    "key error": (CALLS, "def add(a, b):\n    return {}[a]", "error", "KeyError"),
    "type error": (CALLS, "def add(a):\n    return a", "error", "TypeError"),
    "no Python": (ADD, "def add(a, b)\n    return a + b", "error", "SyntaxError"),
    "null bytes": (ADD, "def add(a, b):\n    return '\0'", "error", "null bytes"),
    "import": (ADD, "import torch\ndef add(a, b):\n    return a + b", "error", "ModuleNotFound"),
    "while loading": (ADD, f"```\n1 / 0\n{RIGHT}\n```", "error", "ZeroDivision"),
    "a value of another type": (ADD, "def add(a, b):\n    return str(a + b)", "wrong", "'3'"),
    "an iterator": (CALLS, "def add(a, b):\n    yield a + b", "wrong", "generator"),
    "wrong output": (SCRIPT, "input()\nprint(4)", "wrong", "it must print '3\\n', got '4\\n'"),
    "too little input": (SCRIPT, "x = input()\ninput()", "error", "EOFError"),
    "a failing script": (SCRIPT, "print(3)\nimport sys\nsys.exit(1)", "error", "exit status 1"),
}


@confined
@pytest.mark.parametrize("name", FAILING)
def test_the_first_failing_test_is_named(grader: CodeGrader, name: str) -> None:
    tests, answer, wanted, said = FAILING[name]
    judged = grader.grade([(tests, answer)])[0]
    assert judged.verdict == wanted and said in judged.detail, judged


CHECK = """
def check(candidate):
    assert candidate([3, 1, 2]) == [1, 2, 3]
    for size in range(5):
        numbers = list(range(size))[::-1]
        assert candidate(numbers) == sorted(numbers), f"size {size}"
"""
SORT = Tests("check", entry_point="sort", code=(CHECK,))


@confined
def test_check_calls_the_candidate_and_names_the_failing_line(grader: CodeGrader) -> None:
    assert verdict(grader, SORT, "def sort(x):\n    return sorted(x)") == "right"
    judged = grader.grade([(SORT, "def sort(x):\n    return x if len(x) == 4 else sorted(x)")])[0]
    assert judged.verdict == "wrong"
    assert judged.detail.startswith("assert candidate(numbers) == sorted(numbers)")
    assert "size 4" in judged.detail and "[3, 2, 1, 0]" in judged.detail


NODES = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next

def list_node(values):
    node = None
    for value in reversed(values):
        node = ListNode(value, node)
    return node

def values(node):
    found = []
    while node:
        found.append(node.val)
        node = node.next
    return found
"""
REVERSED = Tests(
    "check",
    entry_point="Solution().reverse",
    setup=NODES,
    code=(
        "def check(candidate):\n    assert values(candidate(list_node([1, 2, 3]))) == [3, 2, 1]\n"
        "    assert values(candidate(list_node(list(range(5000))))) == list(range(5000))[::-1]",
    ),
)
REVERSE = """
class Solution:
    def reverse(self, head):
        last = None
        while head:
            head.next, last, head = last, head, head.next
        return last
"""


@confined
def test_objects_of_the_setup_pass_as_data(grader: CodeGrader) -> None:
    assert verdict(grader, REVERSED, REVERSE) == "right"
    again = NODES.partition("def list_node")[0] + REVERSE  # models repeat the class
    assert verdict(grader, REVERSED, again) == "right"
    forged = "class ListNode:\n    def __eq__(self, other):\n        return True\n" + REVERSE
    assert verdict(grader, REVERSED, forged.replace("return last", "return None")) == "wrong"


ASSERTED = {
    "arguments changed in place": (
        "x = [3, 1]\nadd(x)\nassert x == [1, 3]",
        "def add(x):\n    x.sort()",
    ),
    "an expected exception": (
        "try:\n    add(1)\n    assert False\n"
        "except ValueError as error:\n    assert 'no' in str(error)",
        "def add(x):\n    raise ValueError('no')",
    ),
    "an exception of its own": (
        "try:\n    add(1)\n    assert False\nexcept LookupError:\n    pass",
        "class Mine(KeyError):\n    pass\ndef add(x):\n    raise Mine",
    ),
    "an iterator": ("assert list(add(3)) == [0, 1, 2]", "def add(n):\n    yield from range(n)"),
    "an object with a state": (
        "one = Stack()\none.push(1)\none.push(2)\nassert one.pop() == 2 and len(one) == 1",
        "class Stack:\n    def __init__(self):\n        self.all = []\n"
        "        self.push, self.pop = self.all.append, self.all.pop\n"
        "    def __len__(self):\n        return len(self.all)",
    ),
    "a class with attributes": (
        "assert Point(1, 2).x == 1 and str(Point(1, 2)) == '1, 2'",
        "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n"
        "    def __str__(self):\n        return f'{self.x}, {self.y}'",
    ),
    "an object as an argument": (
        "assert size(Box(3)) == 3",
        "class Box:\n    def __init__(self, n):\n        self.n = n\n"
        "def size(box):\n    return box.n",
    ),
    "a match": (
        "assert add('abc')\nassert not add('xyz')",
        "import re\nadd = re.compile('a').match",
    ),
    "a number of another type": ("assert add(1) == 1", "def add(x):\n    return True"),
    "a named tuple": (
        "assert add(1, 2) == (1, 2)",
        "from collections import namedtuple\nadd = namedtuple('Pair', 'x y')",
    ),
    "modules that the program imports": (
        "assert math.isclose(add(), 1.0)",
        "import math\ndef add():\n    return 1.0",
    ),
    "large integers": ("assert add(10**5000) == 10**5000 + 1", "def add(x):\n    return x + 1"),
    "a value of every type": (
        "value = [None, True, 1.5, 1j, 'x', b'x', {1: (2, {3})}, frozenset([4])]\n"
        "assert add(value) == value",
        "def add(x):\n    return x",
    ),
}


@confined
@pytest.mark.parametrize("name", ASSERTED)
def test_assertions_see_what_the_program_defines(grader: CodeGrader, name: str) -> None:
    code, program = ASSERTED[name]
    judged = grader.grade([(Tests("asserts", code=(code,)), program)])[0]
    assert judged == ("right", "")


@confined
def test_a_comparison_that_only_the_program_could_make_is_refused(grader: CodeGrader) -> None:
    tests = Tests("asserts", code=("assert add(1) == add(1)",))
    program = (
        "class Point:\n    def __eq__(self, other):\n        return True\n"
        "def add(x):\n    return Point()"
    )
    judged = grader.grade([(tests, program)])[0]
    assert judged.verdict == "refused" and "cannot be compared" in judged.detail


VACUOUS = {
    "nothing is called": "assert True",
    "a test that is not called": "class Test:\n    def test_it(self):\n        assert add(1) == 1",
    "a main block": "if __name__ == '__main__':\n    assert add(1) == 1",
}


@confined
@pytest.mark.parametrize("name", VACUOUS)
def test_tests_that_call_nothing_make_nothing_right(grader: CodeGrader, name: str) -> None:
    judged = grader.grade([(Tests("asserts", code=(VACUOUS[name],)), "def add(x):\n    return x")])
    assert judged[0].verdict == "refused" and "call nothing" in judged[0].detail


@confined
def test_functions_of_tests_are_called(grader: CodeGrader) -> None:
    tests = Tests("asserts", code=("def test_add():\n    assert add(1) == 1",))
    assert verdict(grader, tests, "def add(x):\n    return x") == "right"
    assert verdict(grader, tests, "def add(x):\n    return 0") == "wrong"


FORGED = {
    "a stopped iteration": (
        "assert all(map(lambda case: add(case) == case, [1, 2]))",
        "def add(x):\n    raise StopIteration",
    ),
    "a module of its own": (
        "assert math.isclose(add(1), 9)",
        "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef add(x):\n    return 0",
    ),
    "a counter of its own": (
        "assert Counter(add(3)) == Counter([3, 3])",
        "def Counter(x):\n    return 0\ndef add(x):\n    return []",
    ),
    "an imported function in disguise": (
        "assert gcd(add(1), 9) == 9",
        "def gcd(a, b):\n    return 9\ngcd.__module__ = 'math'\ndef add(x):\n    return 1",
    ),
    "an end that a test catches": (
        "try:\n    add(-1)\nexcept:\n    pass",
        "import os\ndef add(x):\n    os._exit(0)",
    ),
}


@confined
@pytest.mark.parametrize("name", FORGED)
def test_a_program_cannot_bring_what_the_tests_compute_with(grader: CodeGrader, name: str) -> None:
    code, program = FORGED[name]
    judged = grader.grade([(Tests("asserts", code=(code,)), program)])[0]
    assert judged.verdict in ("wrong", "error", "refused"), judged


@confined
def test_a_field_cannot_take_the_place_of_a_method(grader: CodeGrader) -> None:
    setup = (
        "class P:\n    def __init__(self, x):\n        self.x = x\n"
        "    def __eq__(self, other):\n        return self.same(other)\n"
        "    def same(self, other):\n        return self.x == other.x\n"
    )
    tests = Tests("asserts", setup=setup, code=("assert add(3) == P(9)",))
    assert verdict(grader, tests, "def add(x):\n    return P(x * x)") == "right"
    assert verdict(grader, tests, "def add(x):\n    return P(0)") == "wrong"
    program = "def add(x):\n    one = P(0)\n    one.same = lambda other: True\n    return one"
    assert verdict(grader, tests, program) == "refused"


NAMED = {
    "sum": ("assert sum(10, 15) == 6", "def sum(a, b):\n    return 6"),
    "Counter": (
        "one = Counter()\none.add()\nassert one.total() == 1",
        "class Counter:\n    def __init__(self):\n        self.n = 0\n"
        "    def add(self):\n        self.n += 1\n    def total(self):\n        return self.n",
    ),
}


@confined
@pytest.mark.parametrize("name", NAMED)
def test_a_function_may_be_named_as_one_of_python(grader: CodeGrader, name: str) -> None:
    code, program = NAMED[name]
    assert grader.grade([(Tests("asserts", code=(code,)), program)])[0] == ("right", "")


@confined
def test_the_same_object_is_the_same(grader: CodeGrader) -> None:
    program = (
        "import enum\nclass Color(enum.Enum):\n    RED = 1\n    BLUE = 2\n"
        "def add(x):\n    return Color.RED"
    )
    assert (
        verdict(grader, Tests("asserts", code=("assert add(1) == Color.RED",)), program) == "right"
    )
    assert (
        verdict(grader, Tests("asserts", code=("assert add(1) == Color.BLUE",)), program) == "wrong"
    )


@confined
def test_a_reference_whose_values_equal_nothing_is_told(grader: CodeGrader) -> None:
    setup = "class P:\n    pass\n"
    tests = Tests("calls", "add", setup, inputs=("(1,)",), reference="def add(x):\n    return P()")
    assert "no value" in grader.check([tests])[0]


@confined
@pytest.mark.parametrize(
    "program",
    [
        "print(3)\nexit()",
        "print(3)\nquit(0)",
        "import atexit\natexit.register(print, 3)",
        "import io, sys\nold, sys.stdout = sys.stdout, io.StringIO()\nold.write('3')",
        "out = open(1, 'w')\nout.write('3')",
    ],
)
def test_a_script_ends_as_any_script_does(grader: CodeGrader, program: str) -> None:
    assert grader.grade([(SCRIPT, f"```python\ninput()\n{program}\n```")])[0] == ("right", "")


@confined
def test_grading_can_be_interrupted() -> None:
    grader = CodeGrader(timeout_s=60.0, workers=1)
    started = time.monotonic()
    threading.Timer(1.0, grader.close).start()
    with pytest.raises(SandboxError, match="stopped"):
        grader.grade([(ADD, "import time\ndef add(a, b):\n    time.sleep(600)")])
    assert time.monotonic() - started < 30


ORACLE = Tests(
    "calls",
    entry_point="root",
    inputs=("(4.0,)", "(2.0,)"),
    reference="import math\ndef root(x):\n    return math.sqrt(x)",
)


@confined
def test_a_reference_gives_the_wanted_values(grader: CodeGrader) -> None:
    assert verdict(grader, ORACLE, "def root(x):\n    return x ** 0.5") == "right"
    assert verdict(grader, ORACLE, "def root(x):\n    return round(x ** 0.5, 4)") == "wrong"
    tolerant = replace(ORACLE, atol=0.01)
    assert verdict(grader, tolerant, "def root(x):\n    return round(x ** 0.5, 4)") == "right"
    either = replace(ORACLE, matches="abs(result * result - args[0]) < 1e-6")
    assert verdict(grader, either, "def root(x):\n    return -(x ** 0.5)") == "right"


@confined
def test_a_value_that_is_too_large_to_be_sent_is_not_compared(grader: CodeGrader) -> None:
    reference = "def add(n):\n    return 'x' * n"
    tests = Tests("calls", "add", inputs=("(70 << 20,)", "(2,)"), reference=reference)
    assert grader.check([tests]) == [""]
    assert verdict(grader, tests, reference) == "right"
    assert verdict(grader, tests, "def add(n):\n    return 'x' * (n % 100)") == "right"
    assert verdict(grader, tests, "def add(n):\n    return 'y' * n") == "wrong"


@confined
def test_where_the_reference_returns_no_data_only_none_counts(grader: CodeGrader) -> None:
    reference = "import re\ndef find(x):\n    return re.search('a', x)"
    tests = Tests("calls", entry_point="find", inputs=("('a',)", "('b',)"), reference=reference)
    assert verdict(grader, tests, reference) == "right"
    assert verdict(grader, tests, "def find(x):\n    return 'a' in x") == "right"
    assert verdict(grader, tests, "def find(x):\n    return True") == "wrong"


@confined
def test_a_slow_reference_gives_programs_more_time() -> None:
    work = "    total = 0\n    for i in range(n):\n        total += i\n    return total"
    slow = f"def work(n):\n{work}"
    tests = Tests(
        "calls", entry_point="work", inputs=("(8_000_000,)",), outputs=("31999996000000",)
    )
    twice = f"def work(n):\n    work_(n), work_(n)\n    return work_(n)\ndef work_(n):\n{work}"
    with CodeGrader(timeout_s=0.3) as grader:
        limited = grader.grade([(tests, "def work(n):\n    while True:\n        pass")])[0]
        assert limited.verdict == "timeout" and "more than 1 s of processor time" in limited.detail
        assert verdict(grader, replace(tests, reference=slow), twice) == "right"


@confined
def test_tests_that_cannot_work_are_told_before_anything_is_graded(grader: CodeGrader) -> None:
    broken = [
        replace(ADD, code=("assert add(1 ==",)),
        replace(ADD, setup="import no_such_module"),
        replace(ADD, reference="def add(a, b):\n    return 0"),
        replace(ORACLE, reference="def root(x):\n    raise ValueError('no')"),
        replace(ORACLE, reference=""),
    ]
    problems = grader.check([ADD, *broken])
    assert problems[0] == "" and all(problems[1:])
    assert "SyntaxError" in problems[1] and "no_such_module" in problems[2]
    assert "it returned 0" in problems[3] and "ValueError" in problems[4]
    with pytest.raises(ValueError, match="tests: must work"):
        grader.grade([(broken[0], RIGHT)])


@confined
def test_references_are_kept_in_a_store() -> None:
    kept: dict[str, bytes] = {}

    class Store:
        def get(self, keys: Any) -> dict[str, bytes]:
            return {key: kept[key] for key in keys if key in kept}

        def put(self, values: Any) -> None:
            kept.update(values)

    with CodeGrader(store=Store()) as grader:
        assert grader.check([ORACLE]) == [""]
    assert len(kept) == 1
    key, value = next(iter(kept.items()))
    kept[key] = value.replace(b'""', b'"from the store"', 1)
    with CodeGrader(store=Store()) as grader:
        assert grader.check([ORACLE]) == ["from the store"]


@confined
def test_verdicts_do_not_depend_on_how_many_run_at_once() -> None:
    pairs = [(ADD, RIGHT), (ADD, "def add(a, b):\n    return 0"), (CALLS, "")] * 4
    verdicts = []
    for workers in (1, 5):
        with CodeGrader(workers=workers) as grader:
            verdicts.append(grader.grade(pairs))
    assert verdicts[0] == verdicts[1]
    assert [one.verdict for one in verdicts[0][:3]] == ["right", "wrong", "no_program"]


@pytest.mark.parametrize(
    "settings", [{"timeout_s": 0}, {"timeout_s": float("inf")}, {"workers": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CodeGrader(**settings)


def test_the_last_block_that_reads_input_is_a_script() -> None:
    answer = "```python\nprint(input())\n```\nFor 1 this prints\n```\nx = 1\n```"
    assert find_program(answer, SCRIPT) == "print(input())\n"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.dates()
    | st.datetimes().map(lambda value: value.replace(fold=0))
    | st.timedeltas(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(deque)
        | st.dictionaries(st.integers() | st.text() | st.tuples(st.integers()), inner)
        | st.frozensets(st.integers() | st.text())
        | st.sets(st.tuples(st.text(), st.booleans()))
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(plain)
def test_data_comes_back_as_it_was(value: Any) -> None:
    back = decode(Encoder({}).encode(value), {})
    assert back == value and type(back) is type(value)


def test_further_types_come_back() -> None:
    kinds = [Counter("aab"), OrderedDict(a=1), Decimal("1.50"), range(3, 9, 2), bytearray(b"x")]
    kinds += [Fraction(1, 3), date(2020, 2, 2), datetime(2020, 2, 2, 3), timedelta(1, 2, 3)]
    for value in (*kinds, float("inf"), -0.0, "\ud800"):
        back = decode(Encoder({}).encode(value), {})
        assert back == value and type(back) is type(value) and repr(back) == repr(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"value": 1}', '{"value": {"": "eval", "v": "1"}, "objects": []}'),
        '{"value": {"": "object", "v": 7}, "objects": []}',
        '{"value": {"": "int", "v": "x"}, "objects": []}',
        '{"value": {"": "set", "v": [[1]]}, "objects": []}',
        '{"value": 1, "objects": [["Other", {}]]}',
        '{"value": {"": "handle", "v": 1}, "objects": []}',
        '{"value": ' + "[" * 5000 + "]" * 5000 + ', "objects": []}',
    ],
)
def test_a_text_that_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(NotData):
        decode(text, {})


def test_what_is_no_data_is_refused_or_kept() -> None:
    with pytest.raises(NotData, match="function"):
        Encoder({}).encode([lambda: 1])
    assert '"handle"' in Encoder({}, lambda value: 5).encode([lambda: 1])


@pytest.mark.parametrize(
    ("value", "wanted", "atol", "right"),
    [
        *((1, 1, 0, True), (1, 2, 0, False), (1.0, 1, 0, True), ("a", "a", 0, True)),
        *((0.1 + 0.2, 0.3, 0, True), (0.3001, 0.3, 0, False), (0.3001, 0.3, 1e-3, True)),
        *(([0.1 + 0.2], [0.3], 0, True), ([0.3, 1], [0.3], 0, False), ((0.3,), [0.3], 0, False)),
        *(
            ([10**400, 2.5], [1.5, 2.5], 1e-6, False),
            (3, 3.0000001, 0, False),
            ([[0.1 + 0.2]], [[0.3]], 0, False),
        ),
        *(([[0.1 + 0.2]], [[0.3]], 1e-6, True), (float("nan"), float("nan"), 0, True)),
        *((float("inf"), float("inf"), 0, True), ("x", 0.3, 1e-6, False), (None, 0.3, 1e-6, False)),
    ],
)
def test_values_are_compared_by_evalplus_rules(
    value: Any, wanted: Any, atol: float, right: bool
) -> None:
    assert same(value, wanted, atol) is right


@pytest.mark.parametrize(
    ("printed", "wanted", "right"),
    [
        *(("3\n", "3", True), ("3 \n\n", "3\n", True), ("3\n4\n", "3 4\n", False)),
        *(("3.0\n", "3\n", True), ("1e3", "1000", True), ("0.30000001", "0.3", False)),
        *(("YES", "yes", False), ("", "3", False), ("3", "", False), ("sNaN", "NaN", False)),
        *(("1_000", "1000", False), ("a  b\n", "a b\n", True), ("3 4 5", "3 4", False)),
    ],
)
def test_outputs_are_compared_line_by_line(printed: str, wanted: str, right: bool) -> None:
    assert same_output(printed, wanted) is right


PAGE = Path(__file__).parents[3] / "docs" / "guides" / "programs.md"


@confined
def test_the_page_about_programs_is_true(
    grader: CodeGrader, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.strip().splitlines()[-1].removeprefix("# ")
    forms = [json.loads(one) for one in _forms(text)]
    assert len(forms) == 5
    for number, tests in enumerate(forms):
        row = {"prompt": "Add.", "tests": tests}
        if number in (2, 3):
            row["entry_point"] = "add"
        (example,) = load_examples([row], need_completion=False)
        assert example.tests is not None, example.outcome
        program = "x, y = map(int, input().split())\nprint(x + y)" if number == 4 else RIGHT
        wrong = program.replace("x + y", "x - y").replace("a + b", "a - b")
        assert verdict(grader, example.tests, f"```\n{program}\n```") == "right"
        assert verdict(grader, example.tests, f"```\n{wrong}\n```") == "wrong"


def _forms(text: str) -> list[str]:
    """Return the examples of the table of tests."""
    table = text.partition("| form |")[2].partition("\n\n")[0]
    return re.findall(r"\| `([\[{\"].*)` \|$", table, flags=re.MULTILINE)
