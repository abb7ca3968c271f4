"""Evaluation: distances on features, held-out classification, diversity, speed."""
