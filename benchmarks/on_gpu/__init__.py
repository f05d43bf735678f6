"""The benchmarks of a GPU, in one run; `benchmarks/gpu.py` drives them.

jobs.py says what is timed and in which order, worker.py times it, in a process that supervise.py
watches and replaces; report.py makes the page.
"""

# What the log of small_cases.py says: the device could be used, and nothing stopped the run.
STARTED, FINISHED = "the device works", "all calls were made"
