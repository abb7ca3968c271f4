"""Drawing the tokens of images: the AR loop, the two ways to draw a token, and the orders."""

from marval.sampling.draw import DrawByChain, DrawInOneStep, DrawTokens, draw_function, guidance_at, guided_eps
from marval.sampling.loop import check_finite, image_noise, prepare, run, sample
from marval.sampling.orders import ORDERS, Orders, draw_counts, drawing_orders

__all__ = [
    "ORDERS", "DrawByChain", "DrawInOneStep", "DrawTokens", "Orders", "check_finite", "draw_counts", "draw_function",
    "drawing_orders", "guidance_at", "guided_eps", "image_noise", "prepare", "run", "sample",
]  # fmt: skip
