"""A forward and a backward pass recorded once as CUDA graphs, and replayed for every row.

What the kernels of a pass take to launch is longer than short rows take to compute. A recorded
pass is launched as one. It reads and writes the same memory each time, so every row must have the
shapes of the one that it was recorded with.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medqlora.errors import ConfigError, TrainingError, is_out_of_memory
from medqlora.schema import PackedBatch

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
"""Size of a block of gradients, or a little more."""


class Row(NamedTuple):
    """The tensors of a packed row that the layers read; `keep` are the tokens that are scored."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    keep: Tensor | None

    @classmethod
    def of(cls, batch: PackedBatch, keep: Tensor | None) -> Row:
        """Those of a batch."""
        return cls(batch.input_ids, batch.position_ids, batch.cu_seqlens, keep)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def one_stream(device: torch.device) -> Iterator[None]:
    """Run what is inside, and its backward passes, on the stream on which graphs are recorded.

    cuBLAS keeps a workspace for every stream and every thread that multiplied once: a tenth of a GB
    each. A graph cannot be recorded on the default stream. Does nothing on the CPU, nor inside of
    itself.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) == _stream(device):
        yield
        return
    stream, outer = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    torch.cuda.empty_cache()  # what one stream has left, another cannot use
    try:
        with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        outer.wait_stream(stream)
        torch.cuda.empty_cache()


def gradients_in_blocks(
    out: Tensor, parameters: list[nn.Parameter], grad_out: Tensor
) -> list[Tensor | None]:
    """`torch.autograd.grad`, those of neighbouring parameters end to end in blocks of some MB.

    torch's allocator keeps tensors of up to a MiB apart from all others. Gradients of an adapter
    are that small, and there would be memory for all of them that nothing larger can ever use. A
    block takes the place of what the backward pass has done with.

    Args:
        out: What is differentiated.
        parameters: Weights of one model on one device, in the order of its layers.
        grad_out: Gradient of `out`.

    Returns:
        A gradient for each; None where `out` does not depend on it.
    """
    with contextlib.ExitStack() as hooks:
        for members in _neighbours(parameters):
            block = _Block(members)
            for index, p in enumerate(members):
                hooks.callback(p.register_hook(functools.partial(block.take, index)).remove)
        return list(torch.autograd.grad(out, parameters, grad_out, allow_unused=True))


def _neighbours(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    members: list[nn.Parameter] = []
    for p in parameters:
        if members and p.dtype != members[0].dtype:
            yield members
            members = []
        members.append(p)
        if sum(member.nbytes for member in members) >= BLOCK_BYTES:
            yield members
            members = []
    if members:
        yield members


class _Block:
    """Memory for the gradients of a few parameters, taken when the first of them is there."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._places: list[Tensor] = []

    def take(self, index: int, gradient: Tensor) -> Tensor:
        if not self._places:
            sizes = [p.numel() for p in self._parameters]
            self._places = list(gradient.new_empty(sum(sizes)).split(sizes))
        return self._places[index].view_as(gradient).copy_(gradient)


class RecordedPasses:
    """The passes of a model that learns, recorded for rows of each shape when the first comes.

    Where nothing is learned they just run.

    Args:
        forward: `(row, max_length, prefix_length)` to hidden states.
        model: What learns.
        demanded: Whether a pass that waits for the device is an error; it just runs if not.
    """

    def __init__(
        self,
        forward: Callable[[Row, int, int], Tensor],
        model: nn.Module,
        *,
        demanded: bool = True,
    ) -> None:
        self._forward, self._model, self._demanded = forward, model, demanded
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._recorded: dict[Any, RecordedPass] = {}

    def __call__(self, row: Row, max_length: int, prefix_length: int) -> Tensor:
        """What `forward` gives, tied to the gradients of what is learned."""
        if not (torch.is_grad_enabled() and self._parameters):
            return self._forward(row, max_length, prefix_length)
        shapes = tuple(None if t is None else tuple(t.shape) for t in row)
        kind = shapes, max_length, prefix_length, self._model.training
        if kind not in self._recorded:

            def forward(row: Row) -> Tensor:
                return self._forward(row, max_length, prefix_length)

            try:
                self._recorded[kind] = RecordedPass(forward, row, self._parameters)
            except ConfigError as error:
                if self._demanded:
                    raise
                log.warning("%s Until then its kernels are launched one by one.", error)
                self._parameters = []
                return self._forward(row, max_length, prefix_length)
        return self._recorded[kind](row)

    def clear(self) -> None:
        """Forget what was recorded, whose memory nothing else can use; it is recorded again."""
        self._recorded.clear()


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """An operation that waits for the device raises, as it would where it is recorded."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype that does not detect all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


class RecordedPass:
    """A forward and a backward pass recorded as CUDA graphs, replayed for rows of the same shapes.

    Args:
        forward: What is recorded.
        row: A row with the shapes.
        parameters: Weights whose gradients are wanted.

    Raises:
        ConfigError: If the pass waits for the device, which cannot be recorded.
        TrainingError: If recording fails all the same. What torch knows of its generator and of
            its memory is wrong then, so nothing should go on in this process.
    """

    def __init__(
        self,
        forward: Callable[[Row], Tensor],
        row: Row,
        parameters: list[nn.Parameter],
    ) -> None:
        self._row = Row(
            row.input_ids.clone(),
            row.position_ids.clone(),
            row.cu_seqlens.clone(),
            None if row.keep is None else row.keep.clone(),
        )
        device = row.input_ids.device
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        record = functools.partial(
            torch.cuda.graph,
            pool=torch.cuda.graph_pool_handle(),
            stream=_stream(device),
            # The data loader may copy the next row from its own thread meanwhile.
            capture_error_mode="thread_local",
        )
        self.parameters = parameters
        with one_stream(device):
            # What is dropped afterwards does not depend on whether this pass was recorded before.
            with torch.random.fork_rng([device]):
                self._run(forward)  # compiles, and allocates what is allocated once
                try:
                    with _waiting_is_an_error():
                        self._run(forward)
                except RuntimeError as error:
                    if "synchronizing" not in str(error):
                        raise
                    raise ConfigError(
                        "acceleration.compile=cuda_graphs cannot record a pass of this model: it "
                        f"{_first_line(error)}. Set acceleration.compile=default."
                    ) from error
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # the recorded passes have memory of their own
            try:
                with record(self._forward):
                    self._out = forward(self._row)
                self._grad_out = torch.zeros_like(self._out)
                with record(self._backward):
                    gradients = gradients_in_blocks(self._out, self.parameters, self._grad_out)
                    self._gradients = torch.cat([g.flatten() for g in gradients if g is not None])
            except RuntimeError as error:
                for told in (error, error.__context__):
                    if told is not None and is_out_of_memory(told):
                        raise torch.OutOfMemoryError(str(told)) from error
                raise TrainingError(
                    "acceleration.compile=cuda_graphs could not record a pass of this model "
                    f"({_first_line(error)}). Set acceleration.compile=default."
                ) from error
        self._out = self._out.detach()
        self.number = 0

    def _run(self, forward: Callable[[Row], Tensor]) -> None:
        """Both passes once; afterwards `parameters` are those that have a gradient."""
        out = forward(self._row)
        gradients = gradients_in_blocks(out, self.parameters, torch.zeros_like(out))
        pairs = zip(self.parameters, gradients, strict=True)
        self.parameters = [p for p, gradient in pairs if gradient is not None]

    def __call__(self, row: Row) -> Tensor:
        """What `forward` gives for a row, tied to the gradients of the parameters."""
        for place, tensor in zip(self._row, row, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor, non_blocking=True)
        return _Replay.apply(self, *self.parameters)

    def replay_forward(self) -> Tensor:
        """The output, in memory of its own.

        The pass writes where the gradients of the last one lie. Parameters that still hold them,
        as within a window of several rows, first get copies.
        """
        place = self._gradients.untyped_storage().data_ptr()
        for p in self.parameters:
            if p.grad is not None and p.grad.untyped_storage().data_ptr() == place:
                p.grad = p.grad.clone()
        self._forward.replay()
        self.number += 1
        return self._out.clone()

    def replay_backward(self, grad_out: Tensor) -> list[Tensor]:
        """The gradients of the parameters, in memory of the graph that is theirs until it runs."""
        self._grad_out.copy_(grad_out)
        self._backward.replay()
        pieces = self._gradients.split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]


class _Replay(torch.autograd.Function):
    """Ties a recorded pass to autograd."""

    @staticmethod
    def forward(ctx: Any, graph: RecordedPass, *parameters: Tensor) -> Tensor:
        ctx.graph = graph
        out = graph.replay_forward()
        ctx.number = graph.number
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.number != ctx.graph.number:
            raise TrainingError(
                "a recorded pass ran again before its backward pass, which reads what the last one "
                "left. Set acceleration.compile=default."
            )
        return None, *ctx.graph.replay_backward(grads[0])
