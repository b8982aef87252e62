"""What a group answers about itself: coupled slices on one hand, whole layers on the other."""

import dataclasses

import pytest
import torch
from conftest import example, tiny_llama
from torch import nn

from prunekit.errors import TraceError
from prunekit.graph import CoupledGroup, LayerStack, trace


@pytest.fixture(scope="module")
def graph():
    return trace(tiny_llama(layers=3), example())


def test_stacks_have_a_type_of_their_own(graph):
    stack = graph["layers"]
    assert graph.stacks == (stack,)
    assert type(stack) is LayerStack
    assert {type(group) for group in graph.groups} == {CoupledGroup}
    assert (stack.kind, stack.layer, stack.members, stack.consumers) == ("layer", None, (), ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        stack.num_units = 2
    with pytest.raises((TypeError, ValueError), match="kind"):
        dataclasses.replace(stack, kind="mlp")


def test_what_groups_say_of_their_units(graph):
    stack, mlp = graph["layers"], graph["layers.0.mlp"]
    channel = next(group for group in graph.groups if group.kind == "channel")
    told = [(g.sets_width, g.spans_depth, g.multiply_adds_known) for g in (stack, mlp, channel)]
    assert told == [(False, True, False), (True, False, True), (True, True, True)]
    assert mlp.likeness == graph["layers.2.mlp"].likeness != channel.likeness


def test_names_that_a_pattern_may_mean(graph):
    stack, mlp = graph["layers"], graph["layers.0.mlp"]
    assert mlp.unit_names() == {}
    assert {"layers", "layers.0", "layers.0.mlp", "model.layers.0.mlp.up_proj"} < mlp.pattern_names
    assert "model.layers.0.mlp.up_proj.weight" in mlp.pattern_names
    assert stack.unit_names()[1] == {"model.layers.1", "layers.1", "1"}
    assert {"layers", "model", "model.layers.2"} < stack.pattern_names


def test_a_vector_joins_the_matrix_of_its_module():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    graph = trace(model, (torch.randn(4, 5),))
    (group,) = (group for group in graph.groups if group.prunable)
    structures = [[part.member for part in parts] for parts in group.structures(graph)]
    names = [[(member.parameter, member.dim) for member in members] for members in structures]
    assert names == [
        [("0.weight", 0), ("0.bias", 0)],
        [("3.weight", 1)],
        [("1.weight", 0), ("1.bias", 0)],
    ]
    assert {member.parameter for member in group.members} > {"1.running_mean", "1.running_var"}
    assert all(member.parameter not in graph.buffers for member in group.scored_members(graph))


def test_a_parameter_of_every_layer_is_a_structure_of_the_stack(graph):
    structures = graph["layers"].structures(graph)
    inside = [name for name in graph.shapes if name.startswith("model.layers.0.")]
    assert len(structures) == len(inside)
    for parts in structures:
        assert [part.units.tolist() for part in parts] == [[0], [1], [2]]
        endings = {part.member.parameter.split(".", 3)[3] for part in parts}
        assert len(endings) == 1
        for part in parts:
            size = graph.shapes[part.member.parameter][0]
            assert part.member.index.tolist() == [list(range(size))]


def test_torch_pruning_cuts_no_whole_layers(graph):
    with pytest.raises(TraceError, match="layers: torch-pruning cuts channels, no whole layers"):
        graph["layers"].to_torch_pruning(tiny_llama(layers=3))


class Standardised(nn.Conv2d):
    """A convolution by weights of mean zero and variance one, as those of BiT."""

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = nn.functional.batch_norm(rows, None, None, training=True)
        return nn.functional.conv2d(x, rows.reshape_as(self.weight), self.bias)


def test_channels_over_which_weights_are_normalised_are_not_exact():
    model = nn.Sequential(Standardised(3, 8, 1), nn.ReLU(), Standardised(8, 4, 1))
    graph = trace(model, (torch.randn(2, 3, 5, 5),))
    (group,) = (group for group in graph.groups if group.prunable)
    assert not group.exact and "normalises over it" in group.reason
