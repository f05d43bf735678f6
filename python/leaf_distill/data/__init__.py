"""Rows of any layout, their rendering for a model, and batches of them."""
