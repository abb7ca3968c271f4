"""marval: masked auto-regressive diffusion in one step (MARVAL, CVPR 2026)."""
