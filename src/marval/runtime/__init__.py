"""What every run needs, whatever it trains: processes, random streams, optimiser, state, log and progress."""
