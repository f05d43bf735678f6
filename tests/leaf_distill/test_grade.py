"""Grading, with real math-verify in real worker processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import psutil
import pytest

from leaf_distill.grade import PAIRS_PER_WORKER, Grader

ENDLESS = "$9^{9^{9^{9}}}$"


def children():
    return psutil.Process().children()


@pytest.fixture(scope="module")
def grader():
    with Grader("math", timeout_s=1.0, workers=2) as one:
        yield one


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("18", "So the answer is 18.", "right"),
        ("18", "The answer is \\boxed{19}", "wrong"),
        (r"\frac{1}{2}", r"so we get \boxed{0.5}", "right"),
        ("x^2+1", "$1+x^2$", "right"),
        ("1,234", "#### 1234", "right"),
        ("6 * 7 = 42\n#### 42", "it is 42 apples", "right"),
        ("Paris", " Paris\n", "right"),
        ("18", "I do not know.", "no_answer"),
        ("18", " \n", "no_answer"),
        # Gold goes first: math-verify takes a relation for its interval, but not the reverse.
        (r"$x<1$", r"$(-\infty,1)$", "right"),
        (r"$(-\infty,1)$", r"$x<1$", "wrong"),
    ],
)
def test_math(grader, gold, prediction, verdict):
    assert grader.grade([(gold, prediction)]) == [verdict]


def test_endless_comparison_is_killed_and_order_is_kept(grader):
    pairs = [(str(i), f"it is {i + i % 2}") for i in range(3 * PAIRS_PER_WORKER)]
    pairs[1:1] = [("18", ENDLESS)]
    pairs.append(("18", ENDLESS))
    expected = ["right" if i % 2 == 0 else "wrong" for i in range(3 * PAIRS_PER_WORKER)]
    assert grader.grade(pairs) == [expected[0], "timeout", *expected[1:], "timeout"]


def test_in_another_thread(grader):
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(grader.grade([("2", "$1+1$")] * 40)))
    thread.start()
    thread.join()
    assert verdicts == ["right"] * 40


def test_dead_worker_is_replaced():
    with Grader("math", workers=1) as grader:
        assert grader.grade([("1", "1.0")]) == ["right"]
        (worker,) = children_of_grader(grader)
        worker.kill()
        worker.wait()
        assert grader.grade([("1", "1.0"), ("2", "1.0")]) == ["right", "wrong"]
    assert not children_of_grader(grader)


def test_worker_that_dies_on_a_pair_twice_gives_it_up():
    before = {child.pid for child in children()}
    verdicts = []
    with Grader("math", timeout_s=300.0, workers=1) as grader:
        thread = threading.Thread(target=lambda: verdicts.extend(grader.grade([("1", ENDLESS)])))
        thread.start()
        killed = set()
        while thread.is_alive():
            for child in children():
                # Kill only what is at work: importing takes far less than two seconds of CPU.
                busy = child.pid not in before | killed and sum(child.cpu_times()[:2]) > 2.0
                if busy:
                    killed.add(child.pid)
                    child.kill()
            time.sleep(0.05)
    assert verdicts == ["timeout"]
    assert len(killed) == 2


def children_of_grader(grader):
    pids = {worker.process.pid for worker in grader._idle}
    return [child for child in children() if child.pid in pids]


def test_script_without_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from leaf_distill.grade import Grader\n"
        "with Grader('math') as grader:\n"
        "    print(grader.grade([('1/2', '0.5')] * 20 + [('1', '2')])[-2:])\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:] = {sys.path!r}; exec(open({str(script)!r}).read())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['right', 'wrong']"


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        ("72", "48 + 24 = 72.", "right"),
        ("1,234.50", "$1234.5", "right"),
        ("-3", "it is -3", "right"),
        ("-3", "it is \u22123", "right"),
        ("4", "7-4", "right"),
        ("4", "7 - 4", "right"),
        ("2500", "2.5e3", "right"),
        ("0.1", "0.10000000000000001", "wrong"),
        ("12", "1,2", "wrong"),
        ("72", "72 of 73", "wrong"),
        ("72", "none", "no_answer"),
        ("72", "", "no_answer"),
        ("blue", "blue", "right"),
        ("blue", "7", "wrong"),
    ],
)
def test_number(gold, prediction, verdict):
    before = len(children())
    with Grader("number") as grader:
        assert grader.grade([(gold, prediction)]) == [verdict]
        assert len(children()) == before  # needs no worker


def test_exact():
    with Grader("exact") as grader:
        pairs = [("a b", " a b\n"), ("a b", "a  b"), ("a", ""), ("1", "1.0")]
        assert grader.grade(pairs) == ["right", "wrong", "no_answer", "wrong"]


def test_bad_settings():
    with pytest.raises(ValueError, match="grade must be one of math, number, exact, not 'maths'"):
        Grader("maths")
    with pytest.raises(ValueError, match="grade_timeout must be above 0"):
        Grader("math", timeout_s=0)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        Grader("math", workers=-1)
