"""The limits of real worker processes: CPU time, a wall time for sleepers, and one more attempt."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from leaf_distill.grading import Grader
from leaf_distill.grading.pool import PAIRS_PER_WORKER

ENDLESS = "$9^{9^{9^{9}}}$"
HARD = ("x^2+1", "$1+x^2$")  # no text or number decides it


def children():
    return psutil.Process().children()


def worker_of(grader):
    """The process of the one idle worker."""
    assert grader.grade([HARD]) == ["right"]
    (worker,) = grader._pool._idle
    return worker, psutil.Process(worker.process.pid)


@pytest.fixture(scope="module")
def grader():
    with Grader("math", timeout_s=1.0, workers=2) as one:
        yield one


def test_endless_comparison_is_killed_and_order_is_kept(grader):
    pairs = [(f"{i}x", f"it is ${i + i % 2}x$") for i in range(2, 3 * PAIRS_PER_WORKER)]
    expected = ["right" if i % 2 == 0 else "wrong" for i in range(2, 3 * PAIRS_PER_WORKER)]
    pairs[1:1] = [("18", ENDLESS)]
    assert grader.grade(pairs) == [expected[0], "timeout", *expected[1:]]


def test_in_another_thread(grader):
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(grader.grade([HARD] * 40)))
    thread.start()
    thread.join()
    assert verdicts == ["right"] * 40


def test_right_answers_are_right_on_a_busy_machine():
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        with Grader("math", timeout_s=0.5, workers=2) as grader:
            pairs = [(rf"\frac{{{i}x}}{{2}}", f"${i / 2}x$") for i in range(1, 25)]
            assert grader.grade(pairs) == ["right"] * len(pairs)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_time_in_which_a_worker_does_not_run_does_not_count():
    with Grader("math", timeout_s=0.3, workers=1) as grader:
        _, process = worker_of(grader)
        verdicts = []
        process.suspend()
        thread = threading.Thread(target=lambda: verdicts.extend(grader.grade([HARD])))
        thread.start()
        time.sleep(1.0)
        assert not verdicts
        process.resume()
        thread.join()
        assert verdicts == ["right"]
        assert worker_of(grader)[1].pid == process.pid


def test_sleeping_worker_ends_and_the_pair_is_tried_again():
    with Grader("math", workers=1) as grader:
        worker, process = worker_of(grader)
        worker.wall_limit_s = 0.2
        process.suspend()
        assert grader.grade([HARD]) == ["right"]
        assert not process.is_running()


def test_dead_worker_is_replaced():
    with Grader("math", workers=1) as grader:
        _, process = worker_of(grader)
        process.kill()
        process.wait()
        assert grader.grade([HARD, ("x+1", "$x+2$")]) == ["right", "wrong"]
        _, process = worker_of(grader)
    assert not process.is_running()


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


def test_plain_numbers_need_no_worker():
    before = len(children())
    with Grader("math") as grader:
        assert grader.grade([("18", "It is 18."), ("18", "#### 19")]) == ["right", "wrong"]
        assert len(children()) == before


def test_script_without_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from leaf_distill.grading import Grader\n"
        "with Grader('math') as grader:\n"
        "    print(grader.grade([('1/2', '0.5')] * 20 + [('1/2', '2')])[-2:])\n"
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
