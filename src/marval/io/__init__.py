"""Files: checkpoints, foreign formats and images."""
