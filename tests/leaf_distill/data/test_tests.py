"""Tests of programs, in every layout in which datasets write them."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from real_data import data_file

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import UnusableRow
from leaf_distill.data.test_layouts import read_tests
from leaf_distill.data.tests import Tests

PATH = Path(__file__).with_name("code_rows.jsonl")
ROWS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]
BY_ID = {row.get("task_id"): row for row in ROWS}
PLUS = [row for row in ROWS if "base_input" in row]
LEETCODE = BY_ID["stone-removal-game"]
ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]


def tests_of(fields: dict[str, Any]) -> Tests:
    tests = read_tests(fields)
    assert tests is not None
    return tests


def names_of(*programs: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for program in programs:
        exec(compile(program, "<program>", "exec", dont_inherit=True), names)
    return names


def arguments(tests: Tests) -> list[Any]:
    return [eval(one, {}) for one in tests.inputs]


def one(record: Any, **options: Any) -> Any:
    (example,) = load_examples([record], **options)
    assert example.outcome is None, example.outcome
    return example


@pytest.mark.parametrize("row", PLUS, ids=lambda row: row["task_id"])
def test_the_reference_of_evalplus_takes_every_input(row: dict[str, Any]) -> None:
    tests = tests_of(row)
    assert (tests.kind, tests.outputs) == ("calls", ())
    assert tests.count == len(row["base_input"]) + len(row["plus_input"])
    program = names_of(tests.setup, tests.reference)[tests.entry_point]
    for given in arguments(tests):
        assert isinstance(given, tuple)
        program(*given)


@pytest.mark.parametrize(
    "row", [row for row in PLUS if "assertion" in row], ids=lambda row: row["task_id"]
)
def test_the_base_inputs_of_mbpp_are_the_literals_of_the_assertions(row: dict[str, Any]) -> None:
    tests, given = tests_of(row), []
    names = names_of(tests.reference)
    program = names[tests.entry_point]

    def watched(*values: Any) -> Any:
        given.append(copy.deepcopy(values))
        return program(*values)

    names[tests.entry_point] = watched
    exec(row["assertion"], names)
    assert repr(arguments(tests)[: len(row["base_input"])]) == repr(given)


@pytest.mark.parametrize(
    ("task", "source"),
    [
        ("Mbpp/63", "([(7, 8), (10, 11)],)"),
        ("Mbpp/106", "([1, 2, 3], ())"),
        ("Mbpp/106", "([1, [2, 3], {'a': 4}], (5, [6, 7], {'b': 8}))"),
        ("Mbpp/124", "(0, complex(0.0, 0.0))"),
        ("Mbpp/124", "(1e-100, complex(0.0, 1e-100))"),
        ("Mbpp/124", "(1, complex(-0.0, -1.0))"),
        ("Mbpp/250", "((), '')"),
        ("Mbpp/301", "({1: None, 2: {3: [1, 2, 3, 'four', {'five': []}]}},)"),
        ("Mbpp/580", "((),)"),
        ("Mbpp/722", "({}, 0, 0)"),
    ],
)
def test_what_json_loses_comes_back_from_the_assertions(task: str, source: str) -> None:
    assert source in tests_of(BY_ID[task]).inputs


def test_lists_in_tuples_are_tuples_below_the_depth_of_the_assertions() -> None:
    row = {**BY_ID["Mbpp/580"], "plus_input": [[[1, [2, [3, [4, [5, [6, [7]]]]]]]]]}
    assert arguments(tests_of(row))[-1] == (
        (
            1,
            (2, (3, (4, (5, (6, (7,)))))),
        ),
    )


def test_without_assertions_the_inputs_stay_as_json_has_them() -> None:
    row = {name: value for name, value in BY_ID["Mbpp/63"].items() if name != "assertion"}
    assert arguments(tests_of(row))[0] == ([[3, 5], [1, 7], [10, 3], [1, 2]],)


def test_sets_keys_and_numbers_that_are_none_come_back() -> None:
    row = {
        "entry_point": "f",
        "canonical_solution": "def f(*a): pass",
        "assertion": "f({'b', 'a'}, {(1, 2): 1.5}, [(1, 'x', [2])], {True: None}, 1 + 1)\nf()",
        "base_input": [],
        "plus_input": [
            [["d", "c"], {"(3, 4)": 2}, [[3, "4", [5]]], {"false": 1}, "9"],
            [[], {}, [], {"x": 0}, float("inf")],
            [[["a"]], {"8": 0}, [], {}, float("nan")],
        ],
    }
    assert tests_of(row).inputs == (
        "({'c', 'd'}, {(3, 4): 2}, [(3, '4', [5])], {False: 1}, '9')",
        "(set(), {}, [], {'x': 0}, float(\"inf\"))",
        "([['a']], {'8': 0}, [], {}, float(\"nan\"))",
    )


def test_the_source_of_a_set_does_not_depend_on_the_process() -> None:
    code = "from leaf_distill.data.python_source import source_of as s; print(s(set('abcdef')))"
    seeds = ({**os.environ, "PYTHONHASHSEED": seed} for seed in "12")
    run = [subprocess.check_output([sys.executable, "-c", code], env=env) for env in seeds]
    assert run[0] == run[1] and run[0].startswith(b"{'a', 'b'")


@pytest.mark.parametrize("plus", [True, False], ids=["evalplus", "check"])
@pytest.mark.parametrize("task", ["HumanEval/1", "HumanEval/10"])
def test_an_answer_to_humaneval_may_repeat_the_function_alone(task: str, plus: bool) -> None:
    hidden = () if plus else ("base_input", "plus_input")
    row = {name: value for name, value in BY_ID[task].items() if name not in hidden}
    tests = tests_of(row)
    assert tests.kind == ("calls" if plus else "check")
    assert tests.prefix == row["prompt"]
    assert tests.reference == row["prompt"] + row["canonical_solution"]
    alone = tests.reference[tests.reference.index(f"def {row['entry_point']}") :]
    names = names_of(tests.setup, alone)  # imports and helpers are in the setup
    exec(row["test"], names)
    names["check"](names[row["entry_point"]])
    with pytest.raises(NameError):
        names = names_of(alone)
        exec(row["test"], names)
        names["check"](names[row["entry_point"]])


def test_leetcode_has_its_classes_in_the_setup() -> None:
    tests = tests_of(LEETCODE)
    assert (tests.kind, tests.count, tests.prefix) == ("check", 1, "")
    assert tests.entry_point == "Solution().canAliceWin"
    assert tests.setup == LEETCODE["prompt"]
    names = names_of(tests.setup, tests.reference, *tests.code)
    names["check"](eval(tests.entry_point, names))


@pytest.mark.parametrize(
    "fields",
    [
        {"tests": ASSERTS},
        {"tests": json.dumps(ASSERTS)},
        {"tests": "\n".join(ASSERTS)},
        {"test_cases": ASSERTS},
        {"test_list": ASSERTS},
        {"assertions": json.dumps(ASSERTS)},
        {"tests": Tests("asserts", code=tuple(ASSERTS)).to_json()},
        {"tests": {"kind": "asserts", "code": ASSERTS, "setup": None, "atol": None}},
    ],
)
def test_asserts_in_any_layout(fields: dict[str, Any]) -> None:
    assert read_tests(fields) == Tests("asserts", code=tuple(ASSERTS))


def test_mbpp_brings_its_imports_and_its_solution() -> None:
    row = {"code": ADD, "test_list": ASSERTS, "test_imports": ["import math", "import re"]}
    setup = "import math\nimport re"
    assert read_tests(row) == Tests("asserts", setup=setup, code=tuple(ASSERTS), reference=ADD)
    row = {"code": ADD, "test_list": ASSERTS, "test_setup_code": "one = 1"}
    assert tests_of(row).setup == "one = 1"


def test_a_script_of_tests_beside_a_test_list_is_one_test() -> None:
    script = "for given in [(1, 2)]:\n    assert add(*given) == 3"
    assert tests_of({"test_list": ASSERTS, "test": script}).code == (script,)
    assert read_tests({"test": script}) is None


def test_each_test_of_a_text_stands_alone() -> None:
    text = (
        "import math\nthree = 3\nassert add(1, 2) == three\n"
        "for n in range(2):\n    assert add(n, 0) == n\n"
    )
    tests = tests_of({"tests": text})
    assert tests.count == 2
    for code in tests.code:
        names_of(ADD, code)
        with pytest.raises(AssertionError):
            names_of("def add(a, b): return 7", code)
    within = "def test_add():\n    assert add(1, 2) == 3\ntest_add()"
    assert tests_of({"tests": within}).code == (within,)


def test_check_as_one_text() -> None:
    check = "def check(candidate):\n    assert candidate(1, 2) == 3"
    found = read_tests({"tests": check, "entry_point": "add"})
    assert found == Tests("check", entry_point="add", code=(check,))


def test_inputs_and_outputs_are_calls_where_a_function_is_named() -> None:
    calls = Tests(
        "calls", entry_point="add", inputs=("(1, 2)", "('a', 'b')"), outputs=("3", "'ab'")
    )
    pairs = {"inputs": [[1, 2], ["a", "b"]], "outputs": [3, "ab"]}
    assert read_tests({"tests": pairs, "entry_point": "add"}) == calls
    assert read_tests({"input_output": json.dumps({**pairs, "fn_name": "add"})}) == calls
    cases = [{"input": [1, 2], "output": 3}, {"input": ["a", "b"], "output": "ab"}]
    assert read_tests({"tests": cases, "entry_point": "add"}) == calls
    # APPS wraps the values of all calls in lists, or of none; a list of our own is a value.
    wrapped = {**pairs, "outputs": [[3], ["ab"]], "fn_name": "add"}
    assert read_tests({"input_output": wrapped}) == calls
    assert tests_of({"tests": wrapped}).outputs == ("[3]", "['ab']")
    method = {"input_output": wrapped, "starter_code": "class Solution:\n    def add("}
    assert tests_of(method).entry_point == "Solution().add"


def test_inputs_and_outputs_are_standard_streams_where_none_is() -> None:
    streams = Tests("stdin", inputs=("1 2\n3", "4"), outputs=("6", "4"))
    pairs = {"inputs": ["1 2\n3", "4"], "outputs": ["6", "4"]}
    assert read_tests({"tests": pairs}) == streams
    assert read_tests({"input_output": json.dumps(pairs)}) == streams
    lines = {"inputs": [["1 2", "3"], "4"], "outputs": [["6"], 4]}
    assert read_tests({"input_output": lines}) == streams
    with pytest.raises(UnusableRow, match="entry_point: must be given"):
        read_tests({"tests": {"inputs": [[1, 2]], "outputs": [3]}})


@pytest.mark.parametrize("tests", [["add(1, 2) == 3"], "x = add(1, 2)"])
def test_tests_that_assert_nothing_are_refused(tests: Any) -> None:
    with pytest.raises(UnusableRow, match="must assert something"):
        read_tests({"tests": tests})


def packed(cases: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def test_livecodebench_on_standard_streams() -> None:
    first, second = (
        {"input": f"{n}\n", "output": f"{n + 1}\n", "testtype": "stdin"} for n in (1, 2)
    )
    for private in (packed([second]), json.dumps([second]), [second]):
        row = {"public_test_cases": json.dumps([first]), "private_test_cases": private}
        assert read_tests({**row, "metadata": "{}", "starter_code": ""}) == Tests(
            "stdin", inputs=("1\n", "2\n"), outputs=("2\n", "3\n")
        )


def test_livecodebench_calls_a_method() -> None:
    cases = [{"input": '[1, 2]\n"x"', "output": "true", "testtype": "functional"}]
    row = {"public_test_cases": "[]", "private_test_cases": packed(cases)}
    assert read_tests({**row, "metadata": json.dumps({"func_name": "has"})}) == Tests(
        "calls", entry_point="Solution().has", inputs=("([1, 2], 'x')",), outputs=("True",)
    )


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_a_pickle_that_would_run_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()
    with pytest.raises(UnusableRow, match=r"names posix\.mkdir"):
        read_tests({"private_test_cases": text})
    assert not list(tmp_path.iterdir())


DEEP = "assert " + "(" * 10000 + ")" * 10000
PAIRS = {"inputs": [[1]], "outputs": [2]}


@pytest.mark.parametrize(
    "fields",
    [
        {"tests": 3},
        {"tests": [1, 2]},
        {"tests": ["assert add(1, 2 == 3"]},
        {"tests": [DEEP]},
        {"tests": ["assert '\0'"]},
        {"tests": ["assert True", " "]},
        {"tests": "print(add(1, 2))"},
        {"tests": "What is 1 + 2?"},
        {"tests": '{"kind": "guess"}'},
        {"tests": '{"kind": "asserts"}'},
        {"tests": '{"kind": "asserts", "code": "assert True"}'},
        {"tests": '{"kind": "asserts", "inputs": ["1"], "outputs": ["1"]}'},
        {"tests": '{"kind": "asserts", "code": ["assert True"], "atol": -1}'},
        {"tests": '{"kind": "calls", "entry_point": "f", "inputs": ["(1,)"]}'},
        {"tests": '{"kind": "calls", "entry_point": "f", "inputs": ["(1"], "outputs": ["1"]}'},
        {"tests": {"inputs": [], "outputs": []}},
        {"tests": {"inputs": ["1"], "outputs": []}},
        {"tests": {"inputs": ["1"]}},
        {"tests": {"inputs": [{"a": 1}], "outputs": ["1"]}},
        {"tests": PAIRS, "entry_point": "a.b"},
        {"tests": PAIRS, "entry_point": "a().b()"},
        {"tests": PAIRS, "entry_point": "class"},
        {"tests": PAIRS, "entry_point": "1f"},
        {"tests": "def check(candidate):\n    assert candidate(1)"},
        {"test": "def check(candidate:", "entry_point": "f"},
        {"test_list": ASSERTS, "test_imports": ["import"]},
        {"test_list": ASSERTS, "test_setup_code": 3},
        {"base_input": [1], "plus_input": [], "entry_point": "f"},
        {"base_input": [[1]], "entry_point": "f", "canonical_solution": "def g(x): pass"},
        {"base_input": [[1]], "entry_point": "f"},
        {"public_test_cases": "[]", "private_test_cases": "[]"},
        {"public_test_cases": "no JSON"},
        {"private_test_cases": base64.b64encode(b"no zlib").decode()},
        {"private_test_cases": base64.b64encode(zlib.compress(b"no pickle")).decode()},
        {"private_test_cases": packed([{"input": "1"}])},
        {"private_test_cases": packed([{"input": "x", "output": "1", "testtype": "functional"}])},
        {
            "public_test_cases": [
                {"input": "1", "output": "1", "testtype": kind} for kind in ("stdin", "functional")
            ]
        },
        {"input_output": "{"},
    ],
)
def test_malformed_tests_are_refused_with_a_sentence(fields: dict[str, Any]) -> None:
    with pytest.raises(UnusableRow, match=r".+: .+") as caught:
        read_tests(fields)
    assert caught.value.reason == "bad_tests"
    (example,) = load_examples(
        [{"prompt": "Add.", "completion": "done", **fields}], need_completion=False
    )
    assert example.outcome is not None and example.outcome.reason == "bad_tests"


@pytest.mark.parametrize(
    "fields",
    [
        *({}, {"tests": None}, {"tests": " "}, {"test_list": []}, {"tests": {}}),
        *({"test": "a text"}, {"starter_code": "x"}, {"code": "x"}, {"entry_point": "f"}),
    ],
)
def test_other_rows_have_no_tests(fields: dict[str, Any]) -> None:
    assert read_tests(fields) is None
    example = one({"prompt": "What is 2 + 2?", "completion": "4", **fields})
    assert example.tests is None and example.completion == "4"


def test_the_prompts_and_answers_of_datasets_of_programs() -> None:
    examples = load_examples(str(PATH))
    assert [example.outcome for example in examples] == [None] * len(ROWS)
    by_id = dict(zip(BY_ID, examples, strict=True))
    human = by_id["HumanEval/10"]
    whole = BY_ID["HumanEval/10"]["prompt"] + BY_ID["HumanEval/10"]["canonical_solution"]
    assert human.text == BY_ID["HumanEval/10"]["prompt"]
    assert human.completion.startswith("```python\ndef is_palindrome(")
    assert human.completion.strip("`\n").removeprefix("python\n") == whole.strip("\n")
    solution = BY_ID["Mbpp/63"]["canonical_solution"].strip("\n")
    assert by_id["Mbpp/63"].completion == f"```python\n{solution}\n```"
    leet = by_id["stone-removal-game"]
    assert leet.text == LEETCODE["query"]
    assert leet.completion == "```python\n" + LEETCODE["completion"].strip("\n") + "\n```"
    math = by_id[None]
    assert math.tests is None and math.completion == BY_ID[None]["answer"]
    assert all(
        example.tests == read_tests(row) for example, row in zip(examples, ROWS, strict=True)
    )


def test_tests_stand_for_the_answer_where_no_completion_is_needed() -> None:
    streams = [{"input": "1", "output": "1", "testtype": "stdin"}]
    for row in (
        {"question": "Add two numbers.", "test_cases": ASSERTS},
        {"prompt": "Add two numbers.", "tests": ASSERTS},
        {"messages": [{"role": "user", "content": "Add two numbers."}], "tests": ASSERTS},
        {"question_content": "Add two numbers.", "public_test_cases": streams, "starter_code": ""},
    ):
        example = one(row, need_completion=False)
        assert (example.text, example.completion) == ("Add two numbers.", "")
        (left,) = load_examples([row, {"prompt": "a", "completion": "b"}])[:1]
        assert left.outcome is not None
        assert left.outcome.reason in ("no_completion", "empty_completion", "no_user_turn")


def test_starter_code_is_part_of_the_prompt() -> None:
    cases = [{"input": "1\n2", "output": "3", "testtype": "functional"}]
    starter = "class Solution:\n    def add(self, a, b):\n        "
    row = {"public_test_cases": cases, "metadata": {"func_name": "add"}, "starter_code": starter}
    example = one({"question_content": "Add.", **row}, need_completion=False)
    assert example.text.startswith("Add.\n\n")
    assert example.text.endswith(f"```python\n{starter.rstrip()}\n```")


def test_columns_of_other_names_are_mapped() -> None:
    row = {"task": "Add.", "reply": "...", "my_tests": json.dumps(PAIRS), "fn": "add", "from": "me"}
    columns = {"prompt": "task", "completion": "reply", "tests": "my_tests", "entry_point": "fn"}
    example = one(row, columns={**columns, "source": "from"})
    assert example.tests == Tests("calls", entry_point="add", inputs=("(1,)",), outputs=("2",))
    assert (example.text, example.completion, example.source) == ("Add.", "...", "me")


def test_the_source_of_a_row_is_read_where_it_is_text_or_a_whole_number() -> None:
    row = {"prompt": "a", "completion": "b"}
    given = [
        {"source": "math"},
        {"data_source": "code"},
        {"source": 3},
        {"source": 0.5},
        {"source": " "},
        {},
    ]
    sources = [one({**row, **fields}).source for fields in given]
    assert sources == ["math", "code", "3", None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("humanevalplus/HumanEvalPlus.jsonl.gz", 164),
        ("humanevalplus/HumanEvalPlus-Mini.jsonl.gz", 164),
        ("mbppplus/MbppPlus.jsonl.gz", 378),
        ("leetcode/LeetCodeDataset-v0.3.1-test.jsonl.gz", 228),
    ],
)
def test_every_row_of_the_real_files_reads_back(name: str, rows: int) -> None:
    examples = load_examples(str(data_file(name)))
    assert [example.outcome for example in examples] == [None] * rows
    for example in examples:
        assert example.tests is not None and example.completion
        assert read_tests({"tests": example.tests.to_json()}) == example.tests
