"""Contexts that lend a model out and leave every module, flag, gradient and buffer as it was.

A function `keep_…` notes one part of the model's state and returns a function that puts it back.
`restoring` calls such functions at the end of a `with` block, after an error too; the contexts
below are composed of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

Restore = Callable[[], None]
_ABSENT = object()  # an instance without an attribute of its own uses that of its class


@contextmanager
def restoring(*restores: Restore) -> Iterator[None]:
    """Call every function at the end of a `with` block, the last one first, after an error too."""
    with ExitStack() as stack:
        for restore in restores:
            stack.callback(restore)
        yield


def keep_attributes(objects: Iterable[object], name: str) -> Restore:
    """Note an attribute that each object has, or lacks, in its own `__dict__`.

    Neither noting nor restoring calls a `__setattr__` or a property of the objects.
    """
    kept = [(vars(one), vars(one).get(name, _ABSENT)) for one in objects]

    def restore() -> None:
        for attributes, value in kept:
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value

    return restore


def keep_modes(model: nn.Module) -> Restore:
    """Note which modules are in training mode and which in evaluation mode."""
    kept = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in kept:
            module.training = training

    return restore


def keep_tensors(tensors: Iterable[Tensor]) -> Restore:
    """Copy tensors; restoring writes the copies back in place, the last one first.

    In that order a tensor that comes twice, changed in between, gets its first value back.
    """
    kept = [(tensor, tensor.clone()) for tensor in tensors]

    def restore() -> None:
        for tensor, before in reversed(kept):
            tensor.copy_(before)

    return restore


def keep_members(model: nn.Module) -> Restore:
    """Note the attributes, submodules and buffers that every module has.

    A forward pass may replace them for good: BigBird's attention, once a text is short. What it
    adds stays: transformers' hooks that capture outputs, and the note that they are there.
    """
    kept = [
        (members, dict(members))
        for module in model.modules()
        for members in (vars(module), module._modules, module._buffers)
    ]

    def restore() -> None:
        for members, before in kept:
            members.update(before)

    return restore


def keep_gradients(model: nn.Module) -> Restore:
    """Note which parameters want a gradient, and the gradients that they hold."""
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def restore() -> None:
        for parameter, flag, gradient in kept:
            parameter.requires_grad_(flag)
            parameter.grad = gradient

    return restore


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode during a `with` block; afterwards every module's mode is what it was.

    Torch's own encoders leave padding in place, where they would make nested tensors without it.
    """
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    with restoring(keep_modes(model), keep_attributes(encoders, "use_nested_tensor")):
        model.eval()
        for encoder in encoders:
            encoder.use_nested_tensor = False
        yield


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """As `evaluating`; what a forward pass changes of buffers and attributes is put back as well.

    A forward pass may count its calls, or take another way from then on.
    """
    with restoring(keep_tensors(model.buffers()), keep_members(model)), evaluating(model):
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on, where no parameter wants a gradient or holds one.

    Inside the `with` block, callers turn on `requires_grad` of the parameters that they need.
    """
    with restoring(keep_gradients(model)):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        with evaluating(model), torch.enable_grad():
            yield
