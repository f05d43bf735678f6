"""The demo's problems: what is planted is where it is said to be, and the arithmetic is right."""

import random
import re

import pytest

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.prompt import Renderer
from leaf_distill.demo import task
from leaf_distill.demo.run import ASSETS
from leaf_distill.demo.task import KINDS, Problem, build_tokenizer, make_problem, make_problems
from leaf_distill.models.tokenizer import load_tokenizer

EVEN = dict.fromkeys(KINDS, 1.0)


def problems_of(kind: task.Kind, count: int = 200) -> list[Problem]:
    return make_problems(count, seed=5, mix={kind: 1.0})


def told(prompt: str) -> int:
    """The answer, read from the text alone."""
    start = int(re.search(r"\w+ has (\d+) ", prompt)[1])
    verb, step = re.search(rf"({'|'.join(task.GAINS + task.LOSSES)}) (\d+) ", prompt).groups()
    return start + int(step) if verb in task.GAINS else start - int(step)


def hinted(problem: Problem) -> int:
    ((start, stop),) = problem.planted
    return int(re.search(r"\d+", problem.prompt[start:stop])[0])


def test_a_seed_decides_the_problems():
    assert make_problems(50, seed=3, mix=EVEN) == make_problems(50, seed=3, mix=EVEN)
    assert make_problems(50, seed=3, mix=EVEN) != make_problems(50, seed=4, mix=EVEN)


@pytest.mark.parametrize("kind", KINDS)
def test_completion_and_answer_are_what_the_text_tells(kind):
    for problem in problems_of(kind):
        answer = told(problem.prompt)
        left, right = problem.completion.split(" = ")
        start, sign, step = left.split()
        assert int(start) + int(f"{sign}{step}") == answer
        assert right == f"{answer} # {answer}"
        assert problem.answer == str(answer)
        assert problem.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_planted_characters_are_one_whole_hint(kind):
    words = re.escape("{number}"), re.escape("{other}")
    known = [
        re.escape(hint).replace(words[0], r"\d+").replace(words[1], r"\w+")
        for hint in (*task.HINTS, task.UNSEEN_HINT)
    ]
    for problem in problems_of(kind):
        rest = problem.prompt
        for start, stop in problem.planted:
            hint = problem.prompt[start:stop]
            expected = known[-1:] if kind == "unseen" else known[:-1]
            assert any(re.fullmatch(pattern, hint) for pattern in expected)
            rest = problem.prompt[:start] + problem.prompt[stop:]
        assert len(problem.planted) == (kind != "clean")
        assert not any(re.search(pattern, rest) for pattern in known)


def test_hints_hit_or_miss():
    for problem in problems_of("aligned"):
        assert hinted(problem) == int(problem.answer)
    for kind in ("misaligned", "unseen"):
        misses = [hinted(problem) - int(problem.answer) for problem in problems_of(kind)]
        assert 0 not in misses
        assert max(map(abs, misses)) <= task.LARGEST_MISS
        assert len(set(misses)) > 8  # not one fixed distance, which could be learned


def test_the_question_comes_last():
    rng = random.Random(0)
    for kind in KINDS:
        for _ in range(50):
            assert make_problem(rng, kind).prompt.endswith(" have now ?")


def test_vocabulary_covers_every_problem_once():
    vocabulary = task.vocabulary()
    assert len(vocabulary) == len(set(vocabulary))
    assert {str(number) for number in range(task.LARGEST_NUMBER + 1)} <= set(vocabulary)
    used = {
        word
        for problem in make_problems(3000, seed=1, mix=EVEN)
        for word in f"{problem.prompt} {problem.completion}".split()
    }
    assert used <= set(vocabulary)


def test_tokens_are_words_with_their_characters():
    tokenizer = build_tokenizer()
    for problem in make_problems(20, seed=2, mix=EVEN):
        encoding = tokenizer(problem.prompt, return_offsets_mapping=True)
        words = [problem.prompt[start:stop] for start, stop in encoding["offset_mapping"]]
        assert words == problem.prompt.split()
        assert tokenizer.decode(encoding["input_ids"]) == problem.prompt


def test_renderer_reads_a_problem_as_it_was_trained_on():
    tokenizer = load_tokenizer(str(ASSETS / "student"))
    problem = problems_of("misaligned", 1)[0]
    (example,) = load_examples([problem.as_row()])
    rendering = Renderer(tokenizer).render(example)
    text = tokenizer.decode(rendering.input_ids)
    assert text == f"<user> {problem.prompt} <assistant> {problem.completion} <end>"
    labels = rendering.input_ids[rendering.loss_mask]
    assert tokenizer.decode(labels) == f"{problem.completion} <end>"
    domain = rendering.offsets[rendering.domain].tolist()
    assert "".join(problem.prompt[start:stop] for start, stop in domain) == problem.prompt


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_shipped_tokenizers_are_this_one(model):
    shipped = load_tokenizer(str(ASSETS / model))
    built = build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert (shipped.eos_token, shipped.pad_token) == (built.eos_token, built.pad_token)
