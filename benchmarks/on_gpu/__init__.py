"""The modules that `benchmarks/gpu.py` runs on a GPU.

table.py says what is timed and in which order, worker.py times it, report.py makes the page;
smoke.py calls every kernel once.
"""

# The log of smoke.py has the first where a device works, the second where nothing failed.
STARTED, FINISHED = "the device works", "all calls were made"
