"""Memory for time, exactly: recomputed blocks, attention kept across recomputation, inputs kept on the host, tiles of tokens.

A recomputed block keeps its input alone. Two things pay at long context: attention's output and log-sum-exp, as large as the
input together, save its most expensive computation; and the input itself can wait in host memory.
"""

import math
import weakref
from collections.abc import Callable

import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn

FEWEST_TOKENS = 1024
"""Tokens below which a tile's matrix products no longer fill a device."""


def recomputed(forward: Callable, *, kept: "KeptAttention | None" = None, inputs: "HostMemory | None" = None) -> Callable:
    """A block's forward(x, ...) that keeps x alone, and computes the rest again in backward. It must draw no random numbers.

    kept: the model's attention, whose results are kept too. inputs: host memory in which x waits.
    """
    context_fn = kept.contexts if kept else noop_context_fn

    def forward_keeping_inputs(x, *args):
        # Saving the state of the random numbers would wait for the device at every block.
        return checkpoint(forward, x, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)

    if inputs is None:
        return forward_keeping_inputs

    def forward_with_inputs_on_host(x, *args):
        shape = x.shape  # the hooks outlive this call, and x must not

        def leave(tensor):
            return inputs.store(tensor) if tensor.shape == shape else tensor

        def come_back(packed):
            return packed.take()[0] if isinstance(packed, Stored) else packed

        # Inside, checkpoint has hooks of its own: these see only what it keeps itself, the arguments.
        with saved_tensors_hooks(leave, come_back):
            return forward_keeping_inputs(x, *args)

    return forward_with_inputs_on_host


# ---- Attention kept across recomputation


class KeptAttention:
    """An attend for a model whose blocks are recomputed: one forward of the kernel a block and step, in backward none.

    The kernel is an attention.Kernel, or whatever else has its forward_with_lse and backward. Outside of a recomputed block,
    and where no gradient is wanted, this is the kernel itself.
    """

    def __init__(self, kernel, keep_on: str = "device"):
        if keep_on not in ("device", "host"):
            raise ValueError(f"attention can be kept on device or host, not {keep_on!r}")
        if not getattr(kernel, "can_be_kept", hasattr(kernel, "forward_with_lse")):
            name, why = getattr(kernel, "name", kernel), getattr(kernel, "why", "it offers no log-sum-exp")
            raise ValueError(
                f"the attention kernel {name!r} cannot be kept across recomputation ({why}): choose another kernel, or full "
                "recomputation"
            )
        self.kernel = kernel
        self.host = HostMemory() if keep_on == "host" else None
        self._pass = None

    # The records live outside the graph; a compiled block is cut here.
    @torch.compiler.disable
    def __call__(self, q, k, v, *, causal: bool = True, cu_seqlens=None):
        if self._pass is None or not torch.is_grad_enabled():
            return self.kernel(q, k, v, causal=causal, cu_seqlens=cu_seqlens)
        return _Keep.apply(q, k, v, self._pass.next_record(), self.kernel, causal, cu_seqlens)

    def contexts(self):
        """checkpoint's context_fn: what the forward pass of one block keeps, its recomputation finds, in the same order."""
        records = []
        return _Pass(self, records, is_first=True), _Pass(self, records, is_first=False)


class _Pass:
    def __init__(self, attend: KeptAttention, records: list, is_first: bool):
        self.attend, self.records, self.is_first = attend, records, is_first

    def __enter__(self):
        self.position, self.outer, self.attend._pass = 0, self.attend._pass, self

    def __exit__(self, *exception):
        self.attend._pass = self.outer

    def next_record(self) -> "_Record":
        if self.is_first:
            self.records.append(_Record(self.attend.host))
        self.position += 1
        return self.records[self.position - 1]


class _Record:
    """(out, lse, saved) of one attention from its forward until its backward."""

    def __init__(self, host: "HostMemory | None"):
        self.host, self.tensors, self.stored, self.saved, self.is_spent = host, None, None, None, False

    @property
    def is_empty(self) -> bool:
        return self.tensors is None and self.stored is None

    def keep(self, out, lse, saved):
        self.saved = saved
        if self.host:
            self.stored = self.host.store(out, lse)
        else:
            self.tensors = (out.detach(), lse)  # another object than the one that autograd gives a history

    def on_device(self):
        if self.tensors is None:
            self.tensors, self.stored = self.stored.take(), None
        return self.tensors

    def clear(self):
        self.tensors = self.stored = self.saved = None
        self.is_spent = True


class _Keep(Function):
    @staticmethod
    def forward(ctx, q, k, v, record, kernel, causal, cu_seqlens):
        if record.is_spent:
            raise RuntimeError("kept attention serves one backward pass; its output and log-sum-exp are freed")
        if record.is_empty:
            out, lse, saved = kernel.forward_with_lse(q, k, v, causal, cu_seqlens)
            record.keep(out, lse, saved)
        else:
            out = record.on_device()[0].detach()
        # Within checkpoint these are recomputed; out, which they would be with it, is in the record.
        ctx.save_for_backward(q, k, v)
        ctx.record, ctx.kernel, ctx.options = record, kernel, (causal, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v = ctx.saved_tensors
        out, lse = ctx.record.on_device()
        gradients = ctx.kernel.backward(grad_out, q, k, v, out, lse, ctx.record.saved, *ctx.options)
        ctx.record.clear()  # this node may outlive the backward pass, with its loss
        return (*gradients, None, None, None, None)


# ---- Host memory


class HostMemory:
    """Buffers in host memory, pinned where there is CUDA, in which tensors wait from forward to backward. They are used again.

    Copies run beside the computation, on one stream: buffers and tensors are handed on in its order, without waiting for the
    device. What was stored last comes back first, so each `take` starts the copy of the tensors that were stored before.
    """

    def __init__(self):
        self.moved_bytes = 0
        """Copied in both directions so far."""
        self.allocated_bytes = 0
        self._free: dict[tuple, list[torch.Tensor]] = {}
        self._stream, self._leaving, self._latest = None, None, None

    def store(self, *tensors: torch.Tensor) -> "Stored":
        """Begin to copy the tensors out. They may be forgotten, not changed."""
        self.settle()
        tensors = [tensor.detach() for tensor in tensors]
        buffers = [self._buffer_for(tensor) for tensor in tensors]
        self.copy(buffers, tensors, tensors[0].device)
        # Their memory is free for others once the copy is done. Computation waits for that at the next store, a block later:
        # record_stream would free it only when the host sees it done, and the host runs many blocks ahead.
        self._leaving = tensors
        stored = Stored(self, buffers, tensors[0].device, self._latest)
        self._latest = weakref.ref(stored)
        return stored

    def settle(self):
        """What is computed from here on comes after the copies so far."""
        if self._stream:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._leaving = None

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor], device: torch.device):
        """Copy, once what the device computes now is done, beside what it computes then."""
        self.moved_bytes += sum(source.nbytes for source in sources)
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):  # None, on a CPU, changes nothing
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def release(self, buffers: list[torch.Tensor]):
        for buffer in buffers:
            self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def _buffer_for(self, tensor: torch.Tensor) -> torch.Tensor:
        free = self._free.get((tensor.shape, tensor.dtype))
        if free:
            return free.pop()
        self.allocated_bytes += tensor.nbytes
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda")


class Stored:
    """Tensors in host memory, for one return to the device."""

    def __init__(self, host: HostMemory, buffers: list[torch.Tensor], device: torch.device, before):
        self.host, self.buffers, self.device, self.before, self.coming = host, buffers, device, before, None

    def prefetch(self):
        """Begin to copy back."""
        if self.buffers is not None and self.coming is None:
            self.coming = [torch.empty_like(buffer, device=self.device, pin_memory=False) for buffer in self.buffers]
            self.host.copy(self.coming, self.buffers, self.device)

    def take(self) -> list[torch.Tensor]:
        """The tensors on the device. Their buffers are given back: this works once."""
        if self.buffers is None:
            raise RuntimeError("what is kept in host memory serves one backward pass; its buffers are in use again")
        self.prefetch()
        self.host.settle()
        tensors, buffers, self.coming, self.buffers = self.coming, self.buffers, None, None
        self.host.release(buffers)
        before = self.before and self.before()
        if before:
            before.prefetch()
        return tensors


# ---- Tiles of tokens


def in_tiles(function: Callable, x: torch.Tensor, weights: tuple[torch.Tensor, ...], num_tiles: int) -> torch.Tensor:
    """function(x, *weights) for a function of each token x[..., :] on its own, returning x's shape.

    With more than one tile, what the function holds in between exists for one tile of tokens at a time, in forward and in
    backward, which computes it again. Gradients of the weights are summed over the tiles in fp32.
    """
    return function(x, *weights) if num_tiles == 1 else _in_many_tiles(function, x, weights, num_tiles)


# Traced, the saved tensors below would be asked for twice, and a block be recomputed twice.
@torch.compiler.disable
def _in_many_tiles(function, x, weights, num_tiles):
    # x and the weights are saved before anything is computed. A recomputed block stops at the last tensor that it needs:
    # saved by _Tiles itself, that would be after a forward in tiles whose result nobody reads.
    memory = _Remember.apply(x, *weights)
    return _Tiles.apply(function, num_tiles, memory.grad_fn, x, *weights)


class _Remember(Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("its output is used by nothing")


class _Tiles(Function):
    @staticmethod
    def forward(ctx, function, num_tiles, memory, x, *weights):
        ctx.function, ctx.num_tiles, ctx.memory = function, num_tiles, memory
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for target, tile in zip(*(_tiles(tensor, num_tiles) for tensor in (out, x)), strict=True):
            target.copy_(function(tile, *weights))
        return out

    @staticmethod
    def backward(ctx, grad_out):
        if ctx.memory is None:
            raise RuntimeError("a feed-forward half in tiles serves one backward pass; its inputs are freed")
        x, *weights = ctx.memory.saved_tensors
        ctx.memory = None  # and with it what it remembers
        weights = [
            weight.detach().requires_grad_(needed) for weight, needed in zip(weights, ctx.needs_input_grad[4:], strict=True)
        ]
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        sums = [
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for weight in weights
            if weight.requires_grad
        ]
        for target, tile, grad in zip(*(_tiles(tensor, ctx.num_tiles) for tensor in (grad_x, x, grad_out)), strict=True):
            _add_gradients(ctx.function, tile, weights, grad, (target, *sums))
        remaining = iter(sums)
        of_weights = [next(remaining).to(weight.dtype) if weight.requires_grad else None for weight in weights]
        return (None, None, None, grad_x, *of_weights)


def _add_gradients(function, tile, weights, grad, totals):
    """Add to totals, of the tile and of the weights that are trained. A call of its own: nothing of it meets the next tile."""
    with torch.enable_grad():
        inputs = [tile.detach().requires_grad_(), *(weight for weight in weights if weight.requires_grad)]
        gradients = torch.autograd.grad(function(inputs[0], *weights), inputs, grad)
    for total, gradient in zip(totals, gradients, strict=True):
        total += gradient


def _tiles(tensor: torch.Tensor, num_tiles: int) -> tuple[torch.Tensor, ...]:
    return tensor.flatten(0, -2).chunk(num_tiles)


def feed_forward_bytes(num_tokens: int, dim: int, ffn_dim: int, value_bytes: int, num_tiles: int = 1) -> int:
    """What the backward of a SwiGLU half holds at its peak, beside its input, output and their gradients.

    That is while the product of silu(w1 n) and w3 n is differentiated: n, its products with w1 and w3, the silu, and the
    gradients of the product and of both of its factors. The product itself, needed for w2's gradient, is gone by then.
    """
    return math.ceil(num_tokens / num_tiles) * (6 * ffn_dim + dim) * value_bytes


def choose_tiles(num_tokens: int, dim: int, ffn_dim: int, value_bytes: int, budget_bytes: int) -> int:
    """The smallest power of two whose tiles need at most budget_bytes, or the largest whose tiles have FEWEST_TOKENS."""
    num_tiles = 1
    while num_tokens >= 2 * num_tiles * FEWEST_TOKENS:
        if feed_forward_bytes(num_tokens, dim, ffn_dim, value_bytes, num_tiles) <= budget_bytes:
            break
        num_tiles *= 2
    return num_tiles
