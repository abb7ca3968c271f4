"""`marval serve`: a web page that shows one-step masked generation and lets people use it."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: no request to other hosts
