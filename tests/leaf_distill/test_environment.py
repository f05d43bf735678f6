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
    found, cpu = printed(capsys), torch.device("cpu")
    reason = missing("cpu", cpu, torch.float32)
    assert found["kernels on cpu"].startswith("reference runs " if reason else "cpu runs ")
    for op in ("grad_norm", "detect_spans", "linear_dual_kl"):
        assert op in found["kernels on cpu"]
    if reason is None:
        info = leaf_ext.build_info()
        assert info["instruction_set"] in found["built for CPUs"]
        assert info["compiler"] in found["leaf_ext"] and info["torch"] in found["leaf_ext"]
    if not torch.cuda.is_available():
        assert found["not cuda"] == missing("cuda", torch.device("cuda"), torch.float32)


def test_without_a_build_it_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leaf_ext.native._INFO", None)
    for name in ("leaf_ext.native.ERROR", "leaf_distill.environment.ERROR"):
        monkeypatch.setattr(name, "there is no compiled module")
    found = printed(capsys)
    assert found["leaf_ext"].endswith("the reference runs: there is no compiled module")
    assert found["kernels on cpu"].startswith("reference runs grad_norm")
    assert found["not cpu"] == "there is no compiled module"
