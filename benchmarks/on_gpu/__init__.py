"""The modules that `benchmarks/gpu.py` runs on a GPU.

table.py lists the jobs in their order, worker.py times them, report.py writes the page, and
smoke.py calls every kernel once.
"""

# The log of smoke.py contains the first if the device works, the second if nothing failed.
STARTED, FINISHED = "the device works", "all calls were made"
