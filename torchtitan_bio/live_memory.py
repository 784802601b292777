"""How much memory a computation holds, counted from its tensors: on any device, and without one where the tensors are fake.

`LiveMemory` sees each operation of its thread and the storages that come out of it, so it counts what a caching allocator would
have to give out, without its rounding and without what kernels take for themselves.
"""

import contextlib
import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """`live` and `peak` bytes of all storages that were made since it was entered. Set peak = live to begin anew."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._undo = contextlib.ExitStack()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # come back with the local tensors: a DTensor's own storage is of the full size, and not real
        result = operation(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self._set(storage, storage.nbytes())
        return result

    def __enter__(self):
        # FSDP frees and refills its buffers by resizing their storages, which no dispatch mode sees.
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage, size):
            result = resize(storage, size)
            self._set(storage, size)
            return result

        torch.UntypedStorage.resize_ = resize_and_count
        self._undo.callback(setattr, torch.UntypedStorage, "resize_", resize)
        return super().__enter__()

    def __exit__(self, *error):
        self._undo.close()
        return super().__exit__(*error)

    def _set(self, storage, size: int):
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int):
        self.live -= self._sizes.pop(key)


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps for its backward what an accelerator's fused kernel keeps: the input and a scale a token."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()
        scale = torch.rsqrt(squares / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, inner = x * scale, grad * weight
        grad_x = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype), None


@contextlib.contextmanager
def fused_norms():
    """Inside, every rms_norm has the memory of a fused one, also on a CPU, where torch's takes several copies of its input."""
    original = torch.nn.functional.rms_norm

    def rms_norm(x, normalized_shape, weight=None, eps=None):
        return FusedNorm.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)

    torch.nn.functional.rms_norm = rms_norm
    try:
        yield
    finally:
        torch.nn.functional.rms_norm = original
