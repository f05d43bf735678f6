"""One stage of eight rows for test_store; as a program, it dies where it is told to.

    python store_stage.py WHERE ROOT SYS_PATH_AS_JSON

WHERE: "compute" (in the third batch), "before FILE" or "after FILE" (is renamed), or "nowhere".
"""

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[3])

import pyarrow as pa

from leaf_distill.io import Stage

SCHEMA = pa.schema(
    [("row_id", pa.int64()), ("text", pa.string()), ("norms", pa.list_(pa.float32()))]
)
PLAN = [[3, 1], [0, 2], [5], [4, 6, 7]]


def rows_of(batch):
    for item in batch:
        yield {"row_id": item, "text": f"row {item} é", "norms": [item / 7, item / 3]}


def stage(root, **settings):
    return Stage(Path(root), "saliency", {"model": "abc", **settings}, SCHEMA)


def main(where, root):
    calls = []
    replace = Path.replace

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def compute(batch):
        calls.append(batch)
        if where == "compute" and len(calls) == 3:
            die()
        return rows_of(batch)

    def deadly_replace(self, target):
        if where == f"before {Path(target).name}":
            die()
        replace(self, target)
        if where == f"after {Path(target).name}":
            die()

    Path.replace = deadly_replace
    stage(root).run(PLAN, compute, desc="score")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
