"""What is done around recorded passes; the passes themselves need a GPU: `test_gpu.py`."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medqlora.acceleration import graphs
from medqlora.acceleration.graphs import gradients_in_blocks
from medqlora.errors import ConfigError, TrainingError, is_out_of_memory


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


ROW = graphs.Row(torch.arange(4), torch.arange(4), torch.tensor([0, 4]), None)


class Weighted(torch.nn.Module):
    """Gives its input times a weight of which some was dropped."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, row, max_length, prefix_length):
        return torch.nn.functional.dropout(row.input_ids * self.weight, 0.5)


@pytest.fixture
def recording(monkeypatch):
    """CUDA graphs that record nothing, or end with an error; the generator of the CPU."""
    errors: list[BaseException] = []
    mode: list[Any] = [0]

    @contextlib.contextmanager
    def record(graph, **options):
        yield
        if errors:
            raise errors[0]

    forked = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked([]))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    monkeypatch.setattr(graphs, "_stream", lambda device: None)
    return errors


def test_what_is_tried_before_recording_draws_nothing(recording):
    """So that a run that goes on, and records again, drops what it would have dropped."""
    model, drawn = Weighted(), []

    def forward(row):
        drawn.append(torch.get_rng_state())
        return model(row, 4, 0)

    before = torch.get_rng_state()
    graphs.RecordedPass(forward, ROW, [model.weight])
    assert len(drawn) == 3
    assert torch.equal(drawn[-1], before)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Cannot copy while a stream is capturing\nat ..."), TrainingError),
        (RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), torch.OutOfMemoryError),
    ],
)
def test_why_a_pass_was_not_recorded_is_told(recording, error, kind):
    """Where memory ran out, shorter rows help."""
    recording.append(error)
    model = Weighted()
    with pytest.raises(kind) as told:
        graphs.RecordedPasses(model, model)(ROW, 4, 0)
    assert "\n" not in str(told.value)
    assert is_out_of_memory(told.value) == (kind is torch.OutOfMemoryError)


class Waiting(Weighted):
    """Waits for the device, which torch refuses where that is asked for."""

    def forward(self, row, max_length, prefix_length):
        if torch.cuda.get_sync_debug_mode() == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nat ...")
        return super().forward(row, max_length, prefix_length)


def test_a_pass_that_waits_runs_where_recording_was_not_demanded(recording, caplog):
    """Nothing is recorded for it: recording that fails leaves torch in disorder."""
    recording.append(AssertionError("recorded"))
    model = Waiting()
    with pytest.raises(ConfigError, match=r"cannot record .* it called a synchronizing CUDA"):
        graphs.RecordedPasses(model, model)(ROW, 4, 0)
    passes = graphs.RecordedPasses(model, model, demanded=False)
    for _ in range(2):
        assert passes(ROW, 4, 0).grad_fn is not None
    assert caplog.text.count("cannot record a pass of this model: it called a sync") == 1


def test_where_recording_fails_nothing_goes_on(recording):
    recording.append(RuntimeError("CUDA error: operation not permitted"))
    model = Weighted()
    with pytest.raises(TrainingError, match=r"could not record .*Set acceleration.compile=default"):
        graphs.RecordedPasses(model, model, demanded=False)(ROW, 4, 0)


def test_a_pass_that_ran_again_before_its_backward_pass_is_refused(recording):
    """Its gradients would be those of the second row, or of a mixture."""
    model = Weighted()
    recorded = graphs.RecordedPass(lambda row: model(row, 4, 0), ROW, [model.weight])
    recorded._forward = recorded._backward = SimpleNamespace(replay=lambda: None)
    recorded(ROW).sum().backward()
    first, second = recorded(ROW), recorded(ROW)
    second.sum().backward()
    with pytest.raises(TrainingError, match="ran again before its backward pass"):
        first.sum().backward()
