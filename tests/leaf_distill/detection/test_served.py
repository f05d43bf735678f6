"""Stage 1 with answers from servers, and with answers that the rows bring along."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detect_pair
import pyarrow.parquet as pq
import pytest
from detect_run import CONFOUNDED, ROWS, check_sums, reasons, run, settings, table
from rank_threads import on_each
from small_server import NAME, SmallServer, serving, status

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example
from leaf_distill.detection.answers import Decoding, answer, open_cache, prompted_model
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import DetectResult
from leaf_distill.detection.served import make_request
from leaf_distill.models import server as client
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.server import Server, ServerError

ANSWERS = len(ROWS) + sum(CONFOUNDED)


@pytest.fixture(scope="module")
def shared(pair: dict[str, str]) -> Iterator[dict[str, SmallServer]]:
    with serving(pair["student"]) as student, serving(pair["teacher"]) as teacher:
        yield {"student": student, "teacher": teacher}


@pytest.fixture
def servers(
    shared: dict[str, SmallServer], monkeypatch: pytest.MonkeyPatch
) -> dict[str, SmallServer]:
    monkeypatch.setattr(client, "WAITS_S", (0.01, 0.1))
    for one in shared.values():
        one.reset()
    return shared


@pytest.fixture(scope="module")
def first(
    pair: dict[str, str],
    shared: dict[str, SmallServer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The directory of a finished run with servers and without validation."""
    root = tmp_path_factory.mktemp("first")
    run(pair, root, validate="none", **urls(shared))
    return root


def urls(servers: dict[str, SmallServer]) -> dict[str, Any]:
    return {f"{role}_server_url": one.url for role, one in servers.items()}


def asked(servers: dict[str, SmallServer]) -> int:
    """How many answers the servers have begun since the last call."""
    count = sum(len(one.bodies) for one in servers.values())
    for one in servers.values():
        one.bodies.clear()
    return count


def forbid_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leaf_distill.detection.answers.generate", None)


def test_answers_of_servers_give_the_same_dataset_as_the_models_here(
    pair: dict[str, str],
    finished: DetectResult,
    servers: dict[str, SmallServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_generation(monkeypatch)
    result = run(pair, tmp_path, **urls(servers), server_concurrency=3)
    check_sums(result, len(ROWS))
    for name in ("dataset.parquet", "samples.parquet", "outcomes.parquet"):
        assert (result.arm / name).read_bytes() == (finished.arm / name).read_bytes()
    assert result.funnel["served"] == {"student": NAME, "teacher": NAME}
    assert max(one.busiest for one in servers.values()) <= 3
    count = asked(servers)
    assert count > ANSWERS
    run(pair, tmp_path, **urls(servers))
    assert asked(servers) == 0


def test_only_fields_that_all_servers_take_are_sent(
    pair: dict[str, str], servers: dict[str, SmallServer], tmp_path: Path
) -> None:
    run(pair, tmp_path, **urls(servers))
    bodies = [body for one in servers.values() for body in one.bodies]
    assert {tuple(sorted(body)) for body in bodies} == {
        ("max_tokens", "messages", "model", "temperature")
    }
    assert {message["role"] for body in bodies for message in body["messages"]} == {"user"}
    assert {(body["max_tokens"], body["temperature"]) for body in bodies} == {(4, 0)}


def test_a_known_answer_needs_no_server_where_its_model_is_named(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"teacher_server_model": NAME}
    with serving(pair["teacher"]) as teacher:
        first = run(pair, tmp_path, teacher_server_url=teacher.url, **named)
        away = teacher.url
    before = first.dataset.read_bytes()
    again = run(pair, tmp_path, teacher_server_url=away, **named)
    assert again.dataset.read_bytes() == before
    with serving(pair["teacher"]) as other:  # at another address
        run(pair, tmp_path, teacher_server_url=other.url)
        assert other.bodies == []
    with pytest.raises(ServerError, match=r"^teacher_server_url: must give its list of models"):
        run(pair, tmp_path, teacher_server_url=away)


def test_answers_of_a_server_and_of_the_model_here_are_never_mixed(
    pair: dict[str, str], servers: dict[str, SmallServer], copied: Path
) -> None:
    run(pair, copied, **urls(servers))
    assert asked(servers) > ANSWERS  # although the models here have answered all of them


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"grade": "number"}, False),
        ({"threshold": 0.2, "validate": "none"}, False),
        ({"server_concurrency": 1, "server_timeout": 5.0}, False),
        ({"max_new_tokens": 5}, True),
        ({"system_prompt": "be brief ."}, True),
        ({"chat_template": "none"}, True),
        ({"chat_template_kwargs": {"depth": 1}}, True),
    ],
    ids=str,
)
def test_what_changes_a_request_is_asked_anew(
    pair: dict[str, str],
    first: Path,
    servers: dict[str, SmallServer],
    tmp_path: Path,
    changes: dict[str, Any],
    anew: bool,
) -> None:
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    options = {"validate": "none", **urls(servers), **changes}
    run(pair, tmp_path, **options, output_dir=str(tmp_path / "other"))
    assert (asked(servers) >= len(ROWS)) if anew else (asked(servers) == 0)


def test_a_run_survives_a_server_that_is_started_again(
    pair: dict[str, str],
    finished: DetectResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_generation(monkeypatch)
    monkeypatch.setattr(client, "WAITS_S", (0.05, 0.2))
    result: list[DetectResult] = []
    with serving(pair["student"]) as student:
        with serving(pair["teacher"]) as first:
            options = urls({"student": student, "teacher": first})
            first.delay_s = 0.1
            work = threading.Thread(
                target=lambda: result.append(run(pair, tmp_path, **options, server_concurrency=2))
            )
            work.start()
            while not first.bodies:
                time.sleep(0.01)
        with serving(pair["teacher"], first.server_address[1]) as second:
            work.join()
    assert second.bodies
    for name in ("dataset.parquet", "samples.parquet", "outcomes.parquet"):
        assert (result[0].arm / name).read_bytes() == (finished.arm / name).read_bytes()


def test_a_killed_run_asks_for_what_was_in_flight_and_missing_alone(
    pair: dict[str, str],
    finished: DetectResult,
    servers: dict[str, SmallServer],
    tmp_path: Path,
) -> None:
    run(pair, tmp_path / "whole", **urls(servers))
    whole = asked(servers)
    file = tmp_path / "settings.json"
    options = settings(pair, tmp_path, **urls(servers), server_concurrency=2)
    file.write_text(json.dumps(options))
    kills = 2
    for _ in range(kills):
        command = [sys.executable, detect_pair.__file__, str(file), "7"]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    result = run(pair, tmp_path, **urls(servers), server_concurrency=2)
    assert whole <= asked(servers) <= whole + 2 * kills  # two were in flight at each kill
    assert result.dataset.read_bytes() == finished.dataset.read_bytes()


def test_a_wrong_key_ends_the_run_before_any_answer(
    pair: dict[str, str], servers: dict[str, SmallServer], tmp_path: Path
) -> None:
    servers["teacher"].key = "secret"
    with pytest.raises(ServerError, match="status 401"):
        run(pair, tmp_path, **urls(servers))
    assert asked(servers) == 0 and not (tmp_path / "run").exists()


def test_the_key_is_written_nowhere(
    pair: dict[str, str],
    servers: dict[str, SmallServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers["teacher"].key = "very-secret"
    monkeypatch.setenv("LEAF_API_KEY", "very-secret")
    run(pair, tmp_path, **urls(servers))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not any(b"very-secret" in path.read_bytes() for path in files)


def test_a_row_that_the_server_cannot_take_leaves_with_its_words(
    pair: dict[str, str], servers: dict[str, SmallServer], tmp_path: Path
) -> None:
    servers["student"].troubles = [status(400, "the prompt exceeds the context"), status(422, "no")]
    options = {"validate": "none", "server_concurrency": 1, **urls(servers)}
    result = run(pair, tmp_path, **options)
    check_sums(result, len(ROWS))
    assert reasons(result)["student_too_long"] == 1
    assert reasons(result)["student_server_refused"] == 1
    details = {line["reason"]: line["detail"] for line in table(result.outcomes)}
    assert "exceeds the context" in details["student_too_long"]
    asked(servers)
    again = run(pair, tmp_path, **options)  # the server may have been mended meanwhile
    assert 2 <= asked(servers) <= 4
    assert "student_too_long" not in reasons(again)


def test_a_server_that_refuses_everything_ends_several_processes_too(
    pair: dict[str, str],
    servers: dict[str, SmallServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers["teacher"].troubles = [status(400, "no")] * 100
    config = DetectConfig(**pair, cache_dir=str(tmp_path), grade="exact")
    server = Server("teacher", servers["teacher"].url, NAME, 4, 5.0)

    def ask(joined: Any) -> None:
        one = prompted_model("teacher", LazyModel(pair["teacher"]), config, server)
        with open_cache(config) as cache:
            answer(one, load_examples(detect_pair.make_rows(60)), config, cache)

    errors = [str(one) for one in on_each(2, ask, monkeypatch)]
    assert any("must give an answer to one of 20 requests" in error for error in errors), errors


def test_completions_may_come_from_the_teachers_server(
    pair: dict[str, str], servers: dict[str, SmallServer], tmp_path: Path
) -> None:
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
    servers["teacher"].troubles = [status(400, "too long")]
    result = run(pair, tmp_path, rows, completion_source="teacher", **urls(servers))
    assert reasons(result)["teacher_too_long"] == 1
    lines = [line for line in table(result.dataset) if line["branch"] == "original"]
    assert len(lines) == len(ROWS) - 1
    for line in lines:
        assert line["completion"][0]["content"] == rows[line["row_id"]]["answer"]


@pytest.fixture
def served(pair: dict[str, str], servers: dict[str, SmallServer]) -> Any:
    """A function that makes the request for an Example under some settings."""

    def make(example: Example, role: Any = "teacher", **changes: Any) -> Any:
        config = DetectConfig(**pair, max_new_tokens=4, **changes)
        one = prompted_model(role, LazyModel(pair[role]), config)
        server = Server(role, servers[role].url, NAME, 1, 5.0)
        decoding = Decoding(stop=("x",), temperature=0.5, top_p=0.9)
        request = make_request(one, server, example, config, decoding)
        return server, request

    return make


def example(text: str, **fields: Any) -> Example:
    return Example(0, ({"role": "user", "content": text},), "7", **fields)


def test_a_beginning_of_the_answer_is_sent_as_text_and_continued(served: Any) -> None:
    server, request = served(example("tom has 7 apples .", prefix="seven is"))
    assert request.path == "completions"
    assert request.body["prompt"] == "<user> tom has 7 apples . <assistant> seven is"
    assert request.body.items() >= {"temperature": 0.5, "top_p": 0.9, "stop": ["x"]}.items()
    (found,) = server.answers([request])
    assert found[1].verdict in (None, "cut_off")


def test_plain_text_is_sent_where_there_is_no_chat_template(served: Any) -> None:
    _, request = served(example("tom has 7 apples ."), chat_template="none", system_prompt="be")
    assert (request.path, request.body["prompt"]) == ("completions", "be\n\ntom has 7 apples .")


def test_a_start_token_that_the_server_adds_is_not_sent(
    served: Any, pair: dict[str, str], make_tokenizer: Any
) -> None:
    config = DetectConfig(**pair)
    server = Server("teacher", "http://localhost/v1", NAME, 1, 5.0)
    for kind, start in (("metaspace", ""), ("bytes", "<s>")):
        tokenizer = make_tokenizer(kind, "llama3")
        lazy = LazyModel(pair["teacher"], processing_class=tokenizer)
        one = prompted_model("teacher", lazy, config)
        request = make_request(one, server, example("hi", prefix="a"), config, Decoding())
        head = "<|start_header_id|>user"
        assert request.body["prompt"].startswith(start + head)


def test_messages_tools_and_variables_reach_the_server(served: Any) -> None:
    row = example("hi", template_kwargs={"tools": [{"name": "f"}], "depth": 2})
    _, request = served(row, system_prompt="be brief", chat_template_kwargs={"depth": 1, "b": 3})
    assert request.path == "chat/completions"
    assert [turn["content"] for turn in request.body["messages"]] == ["be brief", "hi"]
    assert request.body["tools"] == [{"name": "f"}]
    assert request.body["chat_template_kwargs"] == {"depth": 2, "b": 3}


def test_each_role_reads_its_own_messages(served: Any) -> None:
    other = ({"role": "user", "content": "for the teacher"},)
    row = example("for the student", teacher_messages=other)
    for role in ("student", "teacher"):
        _, request = served(row, role)
        assert request.body["messages"][0]["content"] == f"for the {role}"


def test_drawn_answers_have_seeds_of_their_own_and_come_again(
    pair: dict[str, str], servers: dict[str, SmallServer], tmp_path: Path
) -> None:
    config = DetectConfig(**pair, cache_dir=str(tmp_path), grade="exact", max_new_tokens=4)
    server = Server("student", servers["student"].url, NAME, 4, 5.0)
    one = prompted_model("student", LazyModel(pair["student"]), config, server)
    texts = []
    for seed in (0, 0, 1):
        rows = [example("tom has 7 apples .") for _ in range(6)]
        with open_cache(config) as cache:
            answer(one, rows, config, cache, decoding=Decoding(temperature=50.0, seed=seed))
        texts.append([row.answers["student"].text for row in rows])
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1
    assert len({body["seed"] for body in servers["student"].bodies}) == 12
    assert all(0 <= body["seed"] < 2**31 for body in servers["student"].bodies)


def given_rows(finished: DetectResult) -> list[dict[str, Any]]:
    """The rows with the answers that the models gave in a finished run, where they were asked."""
    samples = {line["row_id"]: line for line in table(finished.samples)}
    rows = []
    for at, row in enumerate(ROWS):
        sample = samples.get(at, {"student_answer": row["answer"], "teacher_answer": ""})
        rows.append({**row, "s": sample["student_answer"], "t": sample["teacher_answer"]})
    return rows


def test_answers_that_the_rows_bring_along_mark_them_without_a_model(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_generation(monkeypatch)
    columns = {"student_answer": "s", "teacher_answer": "t"}
    rows = given_rows(finished)
    result = run(pair, tmp_path, rows, columns=columns, validate="none")
    check_sums(result, len(ROWS))
    scored = [line["row_id"] for line in table(finished.samples)]
    assert [line["row_id"] for line in table(result.samples)] == scored
    assert result.funnel["notes"]["student_answer_given"] == len(ROWS)
    assert result.funnel["notes"]["teacher_answer_given"] == len(scored)


def test_cut_prompts_are_asked_also_where_the_originals_bring_answers(
    pair: dict[str, str], finished: DetectResult, tmp_path: Path
) -> None:
    rows = given_rows(finished)
    columns = {"student_answer": "s", "teacher_answer": "t"}
    result = run(pair, tmp_path, rows, columns=columns)
    assert result.dataset.read_bytes() == finished.dataset.read_bytes()


def test_a_given_answer_is_none_to_a_cut_prompt_or_to_a_beginning(
    pair: dict[str, str], servers: dict[str, SmallServer], tmp_path: Path
) -> None:
    config = DetectConfig(**pair, cache_dir=str(tmp_path), grade="exact", max_new_tokens=4)
    server = Server("teacher", servers["teacher"].url, NAME, 1, 5.0)
    one = prompted_model("teacher", LazyModel(pair["teacher"]), config, server)
    changes: list[dict[str, Any]] = [{}, {"candidate_id": 0}, {"prefix": "7", "segment": 1}]
    rows = [example("tom has 7 apples .", given={"teacher": "four"}, **two) for two in changes]
    with open_cache(config) as cache:
        answer(one, rows, config, cache)
    assert rows[0].answers["teacher"].text == "four"
    assert "four" not in [row.answers["teacher"].text for row in rows[1:]]
    assert len(servers["teacher"].bodies) == 2


def test_given_answers_of_the_teacher_may_be_the_completions(
    pair: dict[str, str], tmp_path: Path
) -> None:
    rows = [
        {"prompt": row["prompt"], "answer": row["answer"], "teacher_answer": f"{row['answer']} ."}
        for row in ROWS
    ]
    result = run(pair, tmp_path, rows, completion_source="teacher", select="all", validate="none")
    lines = [line for line in table(result.dataset) if line["branch"] == "original"]
    assert [line["completion"][0]["content"] for line in lines] == [
        row["teacher_answer"] for row in rows
    ]
    assert result.funnel["notes"]["teacher_answer_given"] == len(ROWS)


def test_an_answer_that_is_no_text_makes_a_row_unusable_and_an_empty_one_counts_as_none() -> None:
    row = {"prompt": "a", "completion": "b"}
    bad, empty, good = load_examples(
        [
            {**row, "student_answer": 3},
            {**row, "student_answer": " ", "teacher_answer": None},
            {**row, "student_answer": "c", "teacher_answer": "d"},
        ]
    )
    assert bad.outcome is not None and bad.outcome.reason == "bad_student_answer"
    assert empty.outcome is None and empty.given == {}
    assert good.given == {"student": "c", "teacher": "d"}


def test_an_evaluated_model_answers_itself_where_rows_bring_answers(
    pair: dict[str, str], tmp_path: Path
) -> None:
    from leaf_distill.evaluation.config import EvaluateConfig
    from leaf_distill.evaluation.evaluate import evaluate

    rows = [{**row, "student_answer": "tom"} for row in ROWS[:4]]
    config = EvaluateConfig(
        model=pair["teacher"],
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        grade="exact",
        max_new_tokens=4,
    )
    result = evaluate(config, dataset=rows)
    assert "tom" not in pq.read_table(result.answers)["answer"].to_pylist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_server_model": "a"}, "^teacher_server_model: must be given with a server"),
        ({"server_concurrency": 0}, "^server_concurrency: must be from 1 to 1024, got 0"),
        ({"server_timeout": 0.0}, "^server_timeout: must be seconds above 0"),
    ],
    ids=str,
)
def test_settings_of_servers_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectConfig(**changes)
