"""The command line: help, configuration files, and errors that are one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from leaf_distill.cli import COMMANDS, main, parse

NAMES = ["--student", "s", "--teacher", "t", "--dataset", "d", "--output_dir", "o"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        status = main(argv)
    except SystemExit as stop:  # argparse leaves this way, for --help and for usage errors
        status = int(stop.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys)
    assert status == 2
    assert all(name in out for name in COMMANDS)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "detekt")
    assert status == 2 and "'detekt' is not a command; did you mean detect?" in err
    assert "'inspect' is not a command; `leaf` lists them" in run(capsys, "inspect")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_command_is_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert COMMANDS[name].summary in " ".join(out.split())
    assert "default: None" not in out


def test_distill_hides_but_accepts_the_trainers_own_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, _ = run(capsys, "distill", "--help")
    assert "--kd_weight" in out and "--learning_rate" in out and "--adam_beta2" not in out
    argv = [
        "--student",
        "s",
        "--teacher",
        "t",
        "--dataset",
        "d",
        "--output_dir",
        "o",
        "--adam_beta2",
        "0.98",
    ]
    _, config = parse("distill", [*argv, "--adam_beta2", "0.98"])
    assert config.adam_beta2 == 0.98


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "leaf.yaml"
    file.write_text("student: a\nteacher: b\ndataset: c\nthreshold: 0.2\nseed: 7\nteacher_max:\n")
    (config,) = parse("detect", ["--config", str(file), "--threshold", "0.05"])
    assert (config.student, config.threshold, config.seed) == ("a", 0.05, 7)
    assert config.teacher_max is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("treshold: 0.2", "'treshold' is not an option of this command; did you mean threshold?"),
        ("rows: 3", "'rows' is not an option of this command; did you mean max_rows?"),
        ("- a\n- b", "must hold flat `option: value` lines"),
        ("a: [", "must be a readable YAML file"),
        ("[" * 5000, "must be a readable YAML file"),
    ],
)
def test_a_bad_file_is_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "leaf.yaml"
    file.write_text(text)
    status, _, err = run(capsys, "detect", "--config", str(file))
    assert status == 1 and sentence in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["detect", *NAMES, "--treshold", "1"], "--treshold is not an option of this command; did"),
        (["detect", *NAMES, "--foo", "1"], "--foo is not an option of this command"),
        (["detect", *NAMES, "--threshold", "much"], "--threshold: must be a number, got 'much'"),
        (["detect", *NAMES, "--max_rows", "1.5"], "--max_rows: must be a whole number, got '1.5'"),
        (["detect", *NAMES, "--strategy", "words"], "--strategy: must be one of span, collective,"),
        (["detect", *NAMES, "--trust_remote_code", "perhaps"], "must be true or false, got"),
        (["detect", *NAMES, "--threshold"], "--threshold: must have a value, got none"),
        (["detect", *NAMES, "--thresh", "1"], "--thresh is not an option of this command; did"),
        (["detect", *NAMES, "--threshold", "nan"], "threshold: must be from 0 to 1, got nan"),
        (["report"], "run_dir: must be given"),
        (["compare", *NAMES, "--arms", "kd", "spam"], "arms: must be of kd, kd_failed, kd_entropy"),
        (["distill", *NAMES, "--lr_scheduler_type", "foo"], "foo"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, *argv)
    assert status == 2 and sentence in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("command", "given", "near"),
    [
        ("distill", "--lr", "--learning_rate"),
        ("distill", "--confg", "--config"),
        ("detect", "--hlp", "--help"),
        ("distill", "--bs", "--per_device_train_batch_size"),
        ("distill", "--batch_size", "--per_device_train_batch_size"),
        ("distill", "--eval-batch-size", "--per_device_eval_batch_size"),
        ("distill", "--epochs", "--num_train_epochs"),
        ("distill", "--wd", "--weight_decay"),
        ("distill", "--output", "--output_dir"),
        ("distill", "--data", "--dataset"),
        ("distill", "--model=x", "--student or --teacher"),
        ("distill", "--lora_rank", "--lora_r"),
        ("distill", "--max_len", "--max_length"),
        ("distill", "--learnign_rate", "--learning_rate"),
        ("compare", "--lr", "--learning_rate"),
        ("detect", "--rows", "--max_rows"),
        ("evaluate", "--mnt", "--max_new_tokens"),
    ],
)
def test_an_option_under_another_name_is_suggested(
    command: str, given: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, command, given, *NAMES)
    assert status == 2
    assert err.endswith(f" {given} is not an option of this command; did you mean {near}?\n")


@pytest.mark.parametrize("word", ["--lr", "-", "--xyzzy"])
def test_what_is_like_no_option_has_no_suggestion(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, err = run(capsys, "detect", *NAMES, word)
    assert err == f"leaf detect: error: {word} is not an option of this command\n"


def test_a_file_that_is_not_text_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "leaf.yaml"
    file.write_bytes(b"student: \xff\xfe")
    status, _, err = run(capsys, "detect", "--config", str(file))
    assert status == 1 and "leaf.yaml: must be a readable YAML file" in err


@pytest.mark.parametrize("name", ["detect", "distill", "demo"])
def test_an_interrupt_says_what_is_kept(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, name, replace(COMMANDS[name], run=interrupted))
    status, _, err = run(capsys, name, *([] if name == "demo" else NAMES))
    assert status == 130 and COMMANDS[name].interrupted in err


def test_an_unexpected_error_is_one_line_and_its_traceback_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(*arguments: object) -> None:
        json.loads("{")  # raised in another package's code

    monkeypatch.setitem(COMMANDS, "env", replace(COMMANDS["env"], run=bug))
    status, _, err = run(capsys, "env")
    assert status == 1 and "leaf env: error: JSONDecodeError: Expecting" in err
    assert "Traceback" not in err
    log = Path(err.split()[-1])
    assert "JSONDecodeError" in log.read_text() and "in bug" in log.read_text()
    log.unlink()


def test_markup_in_a_path_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "report", "--run_dir", str(tmp_path / "[/red]"))
    assert status == 1 and "[/red]" in err


def test_a_dash_a_list_and_a_mapping_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "leaf.yaml"
    file.write_text(
        "system_prompt: --be brief\nchat_template_kwargs: {enable_thinking: false}\n"
        "trust_remote_code: true\n"
    )
    (config,) = parse("detect", ["--config", str(file)])
    assert config.system_prompt == "--be brief" and config.trust_remote_code is True
    assert config.chat_template_kwargs == {"enable_thinking": False}
    file.write_text("arms: [span, random_tokens]\noutput_dir: o\n")
    arms, detection, training = parse("compare", ["--config", str(file), "--seed", "4"])
    assert arms.arms == ["span", "random_tokens"]
    assert (detection.seed, training.seed) == (4, 4)
    assert detection.output_dir == training.output_dir == "o"


def test_help_is_quick_to_come() -> None:
    """--help of a stage imports neither torch nor transformers."""
    import subprocess
    import sys

    code = (
        "import sys\nfrom leaf_distill.cli import main\n"
        "try:\n    main(['detect', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_missing_run_directory_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "report", "--run_dir", str(tmp_path / "nowhere"))
    assert status == 1 and "nowhere" in err and "Traceback" not in err


def test_env_names_the_versions_and_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "env")
    assert status == 0
    assert "torch" in out and "leaf_ext" in out


def test_python_m_leaf_distill_is_leaf() -> None:
    import subprocess
    import sys

    result = subprocess.run(
        [sys.executable, "-m", "leaf_distill", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0 and "usage: leaf" in result.stdout


@pytest.mark.parametrize("value", ["a\0b", "\udcff"])
def test_text_that_can_be_no_name_is_refused(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "detect", *NAMES, "--system_prompt", value)
    assert status == 2 and "--system_prompt: must be UTF-8 text without null characters" in err
    (tmp_path / "c.yaml").write_text(json.dumps({"dataset": value}))
    status, _, err = run(capsys, "detect", "--config", str(tmp_path / "c.yaml"))
    assert status == 2 and "--dataset: must be UTF-8 text" in err
    status, _, err = run(capsys, "detect", *NAMES, "--chat_template_kwargs", '{"a": "\\ud800"}')
    assert status == 2 and "chat_template_kwargs: must be a JSON object" in err


def test_a_long_value_does_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--dtype", "--columns", "--seed"):
        status, _, err = run(capsys, "detect", *NAMES, option, "[" * 100_000)
        assert status in (1, 2) and len(err) < 2500 and option[2:] in err


def test_a_list_for_a_single_value_and_a_number_beyond_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    for text, sentence in (
        ("student: [a, b]", "student: must be one value, got a list of 2"),
        (f"seed: {'9' * 5000}", "must be a readable YAML file"),
    ):
        file.write_text(text)
        status, _, err = run(capsys, "detect", "--config", str(file))
        assert status == 1 and sentence in err
    status, _, err = run(capsys, "detect", "--student")
    assert status == 2 and "--student: must have a value, got none" in err


def test_lists_come_from_words_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: [a, b]\nbenchmark: gsm8k\nbenchmark_file: [gsm8k=c.jsonl]\n")
    (config,) = parse("evaluate", ["--config", str(file)])
    assert (config.model, config.benchmark) == (("a", "b"), ("gsm8k",))
    words = ["--model", "a", "b", "--benchmark", "gsm8k", "--benchmark_file", "gsm8k=c.jsonl"]
    assert parse("evaluate", words) == (config,)
    (other,) = parse("evaluate", ["--config", str(file), "--model", "c"])
    assert other == replace(config, model=("c",))


@pytest.mark.parametrize(("given", "spins"), [(None, False), ("active", True)])
def test_waiting_threads_leave_their_cores_unless_the_user_says_otherwise(
    given: str | None, spins: bool
) -> None:
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}  # the library of threads tells
    environment.pop("OMP_WAIT_POLICY", None)
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    command = [sys.executable, "-m", "leaf_distill", "env"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    (rounds,) = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", told)
    assert (rounds != "0") == spins


def test_an_import_sets_no_variable() -> None:
    environment = {name: text for name, text in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = (
        "import os, leaf_distill.cli, leaf_distill.training.trainer; print(*os.environ, sep='\\n')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "OMP_WAIT_POLICY" not in done.stdout.split()
