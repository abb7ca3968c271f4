"""A compiled student draws the same, and its blocks are not compiled again for other numbers of tokens and images.

By torch's compiler without code generation, which would need a C++ compiler.
"""

import torch
from torch._dynamo.utils import counters

from marval.sampling.fast import is_compiled
from small import small_pipeline

compile_module = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **how: compile_module(self, backend="eager", **how)
pipeline = small_pipeline("one_step")
expected = pipeline.sample_tokens([0, 1, 2], seeds=0, iterations=4)
assert pipeline.compile() is pipeline
assert is_compiled(pipeline.model)
torch.testing.assert_close(pipeline.sample_tokens([0, 1, 2], seeds=0, iterations=4), expected)
for iterations, count in ((3, 1), (12, 1), (12, 2)):  # torch compiles anew for one image, and for one token
    pipeline.sample_tokens([0] * count, seeds=0, iterations=iterations)
graphs = counters["stats"]["unique_graphs"]
for iterations, count in ((5, 1), (2, 2), (12, 4), (5, 7)):
    pipeline.sample_tokens([0] * count, seeds=0, iterations=iterations)
assert counters["stats"]["unique_graphs"] == graphs > 0, counters
