"""What `benchmarks/gpu.py` runs on a GPU.

table.py says what is timed and in which order, worker.py times it, report.py makes the page;
smoke.py calls every kernel once.
"""

# What the log of smoke.py says: the device could be used, and nothing stopped the run.
STARTED, FINISHED = "the device works", "all calls were made"
