"""Training: one flat loop per stage."""
