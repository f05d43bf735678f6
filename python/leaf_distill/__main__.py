"""`python -m leaf_distill` is `leaf`, so that `accelerate launch -m leaf_distill distill ...` works."""

import sys

from leaf_distill.cli import main

sys.exit(main())
