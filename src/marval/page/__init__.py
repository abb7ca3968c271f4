"""`marval serve`: a web page that shows one-step masked generation and lets people use it."""
