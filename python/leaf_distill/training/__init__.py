"""Stage 2: distillation on originals and counterfactuals."""
