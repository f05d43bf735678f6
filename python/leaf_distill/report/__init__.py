"""One self-contained HTML page about an arm: funnel, token heat maps, cuts, answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError

from leaf_distill.data.source import find_arm
from leaf_distill.io import make_directory, reading, user_directory, write_bytes
from leaf_distill.report.data import read_run
from leaf_distill.report.figure import draw_example, write_figure
from leaf_distill.report.overview import read_overview
from leaf_distill.report.page import GENERATOR, render_page
from leaf_distill.report.place import check_output, output_path
from leaf_distill.report.results import read_results

__all__ = ["write_figure", "write_report"]


def write_report(
    run_directory: str | Path,
    *,
    output: str | Path | None = None,
    samples: int = 20,
    row_ids: Sequence[int] | None = None,
) -> Path:
    """Write the page of an arm of `leaf detect` and return its path.

    The page needs no network: style and script are inside. It also shows what `leaf distill`,
    `leaf evaluate`, `leaf compare` and `leaf analyze` measured, where they wrote into the run
    directory. The same run gives the same bytes.

    Args:
        run_directory: the output directory of `leaf detect`, or one of its arms.
        output: where to write the page; default: report.html in the arm.
        samples: how many scored rows are shown, those with a kept counterfactual first.
        row_ids: the rows that are shown instead, in this order.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no arm or there are several, a file in it cannot be read or has another
            shape, a row is not there, or `output` is a file of something else.
        StoreError: the page cannot be written.
    """
    if samples < 0:
        raise ValueError(f"samples: must be 0 or more, got {samples}; give another number")
    arm = find_arm(user_directory(run_directory, "run_dir").absolute(), "run_dir")
    path = arm / "report.html" if output is None else output_path(output, "output")
    check_output(path, "output", GENERATOR, "report")
    run = read_run(arm, samples=samples, row_ids=row_ids)
    overview = read_overview(arm, run.funnel, run.totals["kept"])
    results = read_results(arm.parent.parent)
    with reading(arm / "samples.parquet"):
        example = draw_example(run.rows)
    with reading(arm / "funnel.json", TemplateError):
        page = render_page(run, overview, results, example)
    make_directory(path.parent)
    write_bytes(path, page.encode(errors="replace"))
    return path
