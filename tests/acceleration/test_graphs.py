"""What is done around recorded passes; the passes themselves need a GPU: `test_gpu.py`."""

from __future__ import annotations

import torch

from medqlora.acceleration.graphs import gradients_in_blocks


def test_gradients_lie_in_blocks_and_are_the_same():
    """Each of them is smaller than a MiB, which torch would keep apart from what is large."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(400, 400) for _ in range(14)))
    model[0].bias.requires_grad_(False)
    model[5].half()
    model[5].register_forward_pre_hook(lambda _, args: args[0].half())
    model[5].register_forward_hook(lambda _, args, out: out.float())
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = model(torch.randn(8, 400))
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, parameters, grad, retain_graph=True)
    gradients = gradients_in_blocks(out, parameters, grad)
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == other.dtype
        assert torch.equal(gradient, other)
    blocks = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients}
    # Before the layer in float16, that layer, and behind it one of 4 MiB and the rest.
    assert [n >> 20 for n in blocks.values()] == [3, 0, 4, 0]
    assert sum(blocks.values()) == sum(p.nbytes for p in parameters)
    assert not any(p._backward_hooks for p in parameters)
