"""Stage 1: from rows to validated counterfactuals."""
