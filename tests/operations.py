"""Counts the operations that tensors are given, and replays them as a CUDA graph does."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What a program waits for a GPU with: numbers and sizes that depend on values.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique"}


def name_of(func):
    return func.overloadpacket.__name__


class Counting(TorchDispatchMode):
    """`launched`: how often each operation was called, views aside; `waited`: those that wait."""

    def __init__(self):
        super().__init__()
        self.launched = Counter()
        self.waited = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = name_of(func)
        if not func.is_view and name not in ("detach", "empty", "new_empty"):
            self.launched[name] += 1
        masks = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or masks:
            self.waited[name] += 1
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Notes operations, and undoes what they change; `replay` calls them on the same tensors."""

    def __init__(self, work):
        super().__init__()
        self.steps, self.before = [], {}
        with self:
            work()
        for storage, copy in self.before.values():
            storage.copy_(copy)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in [*args, *kwargs.values()]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.steps:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)
