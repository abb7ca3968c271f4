"""Losses: pure functions beside their formulas, tensors in, losses and diagnostics out."""
