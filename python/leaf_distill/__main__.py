"""`python -m leaf_distill` is `leaf`, for launchers: `torchrun -m leaf_distill distill ...`."""

import sys

from leaf_distill.cli import main

sys.exit(main())
