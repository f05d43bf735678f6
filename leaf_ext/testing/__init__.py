"""The case table, input makers and error budget that tests and benchmarks share."""
