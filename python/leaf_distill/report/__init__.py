"""One self-contained HTML page about a run: funnel, token heat maps, cuts, answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leaf_distill.io import make_directory, write_bytes
from leaf_distill.report.data import read_run
from leaf_distill.report.page import render_page
from leaf_distill.report.results import read_results

__all__ = ["write_report"]


def write_report(
    run_directory: str | Path,
    *,
    output: str | Path | None = None,
    samples: int = 20,
    row_ids: Sequence[int] | None = None,
) -> Path:
    """Write the page of a run of `leaf detect` and return its path.

    The page needs no network: style and script are inside. It shows `samples` rows (those with a
    kept counterfactual first) or, in the order given, the rows `row_ids`; and what `leaf distill`
    and `leaf evaluate` measured, where their directories lie in the run directory. `output` is by
    default `report.html` there. The same run gives the same bytes.

    Raises FileNotFoundError where the directory is not a run directory, ValueError where a file in
    it cannot be read or a row is not there, StoreError where the page cannot be written.
    """
    directory = Path(run_directory)
    run = read_run(directory, samples=samples, row_ids=row_ids)
    path = directory / "report.html" if output is None else Path(output)
    make_directory(path.parent)
    write_bytes(path, render_page(run, read_results(directory)).encode())
    return path
