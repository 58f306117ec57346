"""The peak of the bytes in tensors, counted operator by operator."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors that ``function`` held at a time, beyond those before it.

    Every tensor that an operator returns counts until its memory is freed, gradients included; what
    an operator frees before it returns does not. (The profiler's memory events would count that
    too, but miss what gloo's own thread frees.)
    """
    with _Counter() as counter:
        function()
    return counter.peak


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = [x.untyped_storage() for x in tree_iter((args, kwargs)) if _is_plain(x)]
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if not _is_plain(x):
                continue
            storage = x.untyped_storage()
            if storage in self.seen or any(storage is known for known in before):
                continue
            self.seen.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _is_plain(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.strided
