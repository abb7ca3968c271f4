"""The losses: pure functions, each beside its formula."""
