"""Compiled models draw and learn the same, and nothing is compiled again for other numbers of tokens and images.

By torch's compiler without code generation, which would need a C++ compiler.
"""

import torch
from torch._dynamo.utils import counters

from marval.sampling.fast import compile_blocks, is_compiled
from small import randn, small_model, small_pipeline

torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would compute without compiling
compile_module = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **how: compile_module(self, **{**how, "backend": "eager"})
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

for kind, dtype in (("one_step", torch.bfloat16), ("chain", torch.float32), ("chain", torch.bfloat16)):
    compiled = small_pipeline(kind).to(dtype=dtype).compile()  # several models of a process, as a page has them
    for count in (1, 2):
        compiled.sample_tokens([0] * count, seeds=0, iterations=4)

model, x_t, contexts = small_model().requires_grad_(True), randn(6, 4), randn(2, 6, 16, seed=1)


def gradients() -> list[torch.Tensor]:
    """Of one head, for a single context and for two, which guidance has."""
    model.zero_grad()
    for given in (contexts[0], contexts):
        model.head.denoise(x_t, model.head.embed_context(given)).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.head.parameters() if parameter.grad is not None]


expected = gradients()
compile_blocks(model.head)
assert not is_compiled(model.encoder_blocks)
for gradient, right in zip(gradients(), expected, strict=True):
    torch.testing.assert_close(gradient, right)
