"""A plugin of pytest (-p on_gpu.failures) that writes each failure as it happens.

pytest prints failures at its end, which a run that is stopped does not reach. With pytest-xdist the
process that collects the results writes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_FILE = Path(os.environ.get("LEAF_FAILURES", "failures.txt"))


class _Writer:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            # The assertion and its line; the log has the traceback.
            shown = [line for line in text if line.startswith(("E ", ">"))] or text[-5:]
            with _FILE.open("a") as file:
                print(f"{report.nodeid} ({report.when})", *shown[:12], sep="\n  ", file=file)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            with _FILE.open("a") as file:
                print(f"{report.nodeid} (collection)\n{report.longrepr}", file=file)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer())
