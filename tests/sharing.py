"""One trace and one rehearsal per structure and session: they would take most of these tests' time.

A coupling graph holds no weights and nobody changes it, so that models of one structure can have
the same one. Whoever imports `trace` from `prunekit.graph` after `share_traces` gets the shared
one: the tests, and prunekit itself. The tests of the tracer itself (`tests/graph`) trace anew.

A rehearsal that changes nothing of a shared graph is not made again by `prunekit.prune`; its own
tests call it directly.
"""

import functools
import sys
from enum import Enum

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from prunekit import graph as tracer

trace_anew = tracer.trace
SHARES = True
_GRAPHS = {}  # structure of a model and its example → (graph, the objects that the key names by id)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
# Neither a forward pass nor the tracer reads these, and they differ between equal models.
_UNREAD = {"training", "name_or_path", "_name_or_path", "_commit_hash", "transformers_version"}


class _Description:
    """Everything a forward pass may depend on but numbers in weights, as a tuple to compare by.

    Objects of an unknown kind are told by their identity: two models with such objects of their
    own share nothing.
    """

    def __init__(self):
        self.positions = {}  # id of an object → when it was first seen, so that ties are told
        self.named_by_id = []  # keeps these objects, so that no other one gets their id

    def describe(self, value):
        """The value as something hashable."""
        if isinstance(value, _PLAIN):
            return (type(value), value)
        if id(value) in self.positions:
            return ("again", self.positions[id(value)])
        self.positions[id(value)] = len(self.positions)
        if isinstance(value, Tensor):
            return (type(value), value.shape, value.dtype, value.device, value.requires_grad)
        if isinstance(value, dict):
            read = [(key, item) for key, item in value.items() if key not in _UNREAD]
            return (type(value), *((self.describe(key), self.describe(item)) for key, item in read))
        if isinstance(value, list | tuple):
            return (type(value), *(self.describe(item) for item in value))
        if isinstance(value, set | frozenset):
            return (type(value), frozenset(self.describe(item) for item in value))
        if isinstance(value, nn.Module):
            return (self.by_id(type(value).forward), *self.of_attributes(value))
        if isinstance(value, PreTrainedConfig | GenerationConfig):
            return self.of_attributes(value)
        return self.by_id(value)

    def of_attributes(self, value):
        return (type(value), self.describe(vars(value)))

    def by_id(self, value):
        self.named_by_id.append(value)
        return (type(value), id(value))


def _numbers(inputs):
    """The numbers of the example inputs, which the graph keeps for surgery's check."""
    leaves = torch.utils._pytree.tree_leaves(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_meta]
    return tuple(tuple(tensor.flatten().tolist()) for tensor in tensors)


@functools.wraps(trace_anew)
def trace_once(model, example_inputs):
    """`prunekit.trace`, but models of one structure share the graph."""
    if not SHARES:
        return trace_anew(model, example_inputs)
    description = _Description()
    key = (description.describe((model, example_inputs)), _numbers(example_inputs))
    if key not in _GRAPHS:
        _GRAPHS[key] = (trace_anew(model, example_inputs), description.named_by_id)
    return _GRAPHS[key][0]


def share_traces():
    """Let whoever imports `trace` from now on have the one that shares."""
    assert "prunekit.pipeline" not in sys.modules, "it holds the one that does not share"
    tracer.trace = sys.modules[trace_anew.__module__].trace = trace_once


def rehearse_once(rehearse):
    """`rehearse`, which returns the graph at once where it found nothing wrong with it before.

    A graph that is not shared is rehearsed each time.
    """
    sound = set()  # (id of a shared graph, whether weights are on meta, saved or not, the groups)

    @functools.wraps(rehearse)
    def once(model, graph, groups, *, saved=False, **options):
        shared = any(graph is other for other, _ in _GRAPHS.values())
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        key = (id(graph), on_meta, saved, *(group.name for group in groups))
        if shared and key in sound:
            return graph
        result = rehearse(model, graph, groups, saved=saved, **options)
        if result is graph:
            sound.add(key)
        return result

    return once


def share_rehearsals():
    """Let `prunekit.prune` and the jobs leave out what was rehearsed well before."""
    from prunekit import pipeline

    pipeline.rehearse = rehearse_once(pipeline.rehearse)
