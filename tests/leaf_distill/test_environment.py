"""`leaf env`: versions, devices, and which kernels run on them."""

from __future__ import annotations

import platform

import pytest
import torch

import leaf_ext
from leaf_distill.cli import main
from leaf_ext.dispatch import missing


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the text of each line by its name; lines that go on are joined."""
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    found: dict[str, str] = {}
    for line in lines:
        name, text = line[:18].strip(), line[18:]
        if name:
            found[name] = text
        else:
            found[next(reversed(found))] += f" {text}"
    return found


def test_it_names_versions_devices_and_the_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAF_CACHE_DIR", "/nowhere")
    found = printed(capsys)
    assert found["torch"] == torch.__version__
    assert found["python"].startswith(f"{platform.python_version()} on ")
    assert "GB free" in found["memory"] and "cores" in found["cpu"]
    assert found["cache"].startswith("/nowhere/rows.sqlite")
    optional = f"{found['optional']}, {found.get('not installed', '')}"
    assert "peft" in optional and "bitsandbytes" in optional
    if not torch.cuda.is_available():
        assert found["gpu"].startswith("torch sees none")


def test_it_says_which_kernels_run_and_why_not_others(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys)
    lacking = missing("cpu", torch.device("cpu"), torch.float32)
    assert leaf_ext.backends("cpu") == {"cpu": lacking, "reference": None}
    assert found["kernels on cpu"] == ("reference" if lacking else "cpu")
    if lacking is None:
        info = leaf_ext.build_info()
        assert info["instruction_set"] in found["built for CPUs"]
        assert info["compiler"] in found["leaf_ext"] and info["torch"] in found["leaf_ext"]
    if not torch.cuda.is_available():
        assert found["not cuda"] == missing("cuda", torch.device("cuda"), torch.float32)


def test_what_cannot_be_read_is_said_and_the_rest_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr("leaf_distill.models.memory.machine_memory", broken)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(leaf_ext, "build_info", broken)
    found = printed(capsys)
    reason = "could not be read: RuntimeError: the driver is too old"
    assert found["processor"] == found["cuda:0"] == reason
    assert found["torch"] == torch.__version__ and "rows.sqlite" in found["cache"]
    lacking = missing("cpu", torch.device("cpu"), torch.float32)
    assert found["kernels on cpu"] == ("reference" if lacking else "cpu")
    if lacking is None:
        assert found["build"] == reason


def test_without_a_build_it_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leaf_ext.native._INFO", None)
    monkeypatch.setattr("leaf_ext.native.ERROR", "there is no compiled module")
    found = printed(capsys)
    assert found["leaf_ext"].endswith("the reference runs: there is no compiled module")
    assert found["kernels on cpu"] == "reference"
    assert found["not cpu"] == "there is no compiled module"
