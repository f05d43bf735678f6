"""Find what misleads a student in the prompts of your own JSONL, and cut it out.

    python examples/detect_jsonl.py

Put your models (directories or hub names) and your file into the constants below. Each line of the
file is an object with a prompt, a completion (a worked solution) and an answer. As it stands, the
embedded toy pair reads the 40 word problems of rows.jsonl, in 15 seconds on 2 cores, and writes to
outputs/detect. It needs nothing besides LeaF.
"""

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

from leaf_distill import DetectConfig, detect, load_examples, write_report

pair = files("leaf_distill") / "demo" / "assets"
STUDENT, TEACHER = str(pair / "student"), str(pair / "teacher")
ROWS = Path(__file__).with_name("rows.jsonl")
# LeaF's names, and those of your file.
COLUMNS = {"prompt": "prompt", "completion": "completion", "answer": "answer"}
GRADE = "number"  # the last number of an answer; "math" for LaTeX, "exact" for labels
MAX_NEW_TOKENS = 12  # the toy's answers have 8; leave room for a whole worked solution
OUTPUT = "outputs/detect"  # of this pair: another pair needs another directory

# 1. Both models answer every row. Where the student is wrong and the teacher right, the gradients
#    of both are compared, suspect words are cut, and a cut is kept if both then answer correctly.
run = detect(
    DetectConfig(
        student=STUDENT,
        teacher=TEACHER,
        dataset=str(ROWS),
        columns=COLUMNS,
        output_dir=OUTPUT,
        grade=GRADE,
        max_new_tokens=MAX_NEW_TOKENS,
    )
)

# 2. The dataset has each original, followed by its cuts. Positions are characters of the prompt.
rows = load_examples(str(run.dataset))
originals = {row.row_id: row for row in rows if row.branch == "original"}
print("\nWhat was cut, in [brackets]:")
for row in rows:
    if row.branch == "counterfactual":
        text = originals[row.row_id].text
        for start, stop in reversed(row.cut):
            text = f"{text[:start]}[{text[start:stop]}]{text[stop:]}"
        print(f"{row.row_id:4}  {text}")

# 3. Every candidate and why it was not kept, if it was not.
candidates = [json.loads(line) for line in (run.arm / "candidates.jsonl").open()]
reasons = Counter(one["reason"] for one in candidates if not one["accepted"])
print(f"{len(candidates)} cuts were tried. Not kept: {dict(reasons)}")
print(f"The dataset, originals and cuts: {run.dataset}")
print(f"Every row in color: {write_report(run.arm)}")
