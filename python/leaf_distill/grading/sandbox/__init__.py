"""Runs Python programs that nobody trusts, confined by the kernel.

`process` starts the processes and watches them, `end` says how they ended. The other modules run
inside, where this package is imported alone, without `leaf_distill` and without site-packages.
"""
