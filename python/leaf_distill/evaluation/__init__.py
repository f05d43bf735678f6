"""Accuracy of a model's answers, and the comparison of arms."""
