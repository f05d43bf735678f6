"""Answers against gold answers: mathematics, numbers, choices, words and texts."""

from leaf_distill.grading.grader import Grader, gold_kinds
from leaf_distill.grading.text import Kind, Verdict, gold_kind, has_number

__all__ = ["Grader", "Kind", "Verdict", "gold_kind", "gold_kinds", "has_number"]
