import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.graph import axes as ax


def only_atom(axis):
    (atom,) = ax.resolve(axis)
    return atom


def test_reshape_splits_an_atom_into_heads():
    rows = ax.fresh(24)
    heads, dim = ax.regroup([rows], [4, 6])
    assert ax.resolve(rows) == heads + dim
    assert ax.owners(rows, only_atom(heads)).tolist() == [i // 6 for i in range(24)]
    assert ax.owners(rows, only_atom(dim)).tolist() == [i % 6 for i in range(24)]


def test_grouped_query_heads_are_key_value_heads_times_repeats():
    kv, repeats, query = ax.fresh(2), ax.fresh(4), ax.fresh(8)
    ax.unify(query, kv + repeats)
    assert ax.owners(query, only_atom(kv)).tolist() == [0] * 4 + [1] * 4
    assert ax.owners(query, only_atom(repeats)).tolist() == [0, 1, 2, 3] * 2


def test_fused_rows_are_a_sum():
    rows = ax.fresh(10)
    query, rest = ax.cut(rows, 6)
    key, value = ax.cut(rest, 2)
    assert ax.owners(rows, only_atom(key)).tolist() == [-1] * 6 + [0, 1] + [-1] * 2
    assert ax.axis_size(value) == 2
    assert ax.axis_size(query) == 6


def test_rotary_halves_become_one_atom():
    dim = ax.fresh(8)
    first, second = ax.cut(dim, 4)
    ax.unify(dim, ax.concatenate([second, first]))
    pair = only_atom(first)
    assert only_atom(second) is pair
    assert ax.owners(dim, pair).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_cut_inside_a_unit_pins():
    axis = ax.fresh(4) + ax.fresh(3)
    ax.cut(axis, 4)
    assert all(atom.pinned for atom in ax.atoms(axis))


def test_a_part_may_be_empty():
    axis = ax.fresh(6)
    for offset in (0, 6):
        head, rest = ax.cut(axis, offset)
        assert (ax.axis_size(head), ax.axis_size(rest)) == (offset, 6 - offset)
        assert ax.concatenate([head, rest]) == axis
    assert only_atom(axis).pinned is None


def test_unalignable_axes_are_pinned_not_guessed():
    left, right = ax.fresh(4) + ax.fresh(6), ax.fresh(6) + ax.fresh(4)
    ax.unify(left, right)
    assert all(atom.pinned for axis in (left, right) for atom in ax.atoms(axis))


def test_what_is_known_of_an_atom_survives_its_split():
    axis = ax.fresh(6, pinned="why")
    ax.tag(axis, "attention")
    outer, inner = ax.regroup([axis], [2, 3])
    assert [atom.pinned for atom in ax.atoms(outer + inner)] == ["why", "why"]
    assert all("attention" in atom.tags for atom in ax.atoms(outer))


def test_an_atom_twice_in_a_product_is_a_diagonal():
    atom = ax.fresh(3)
    assert set(ax.owners(atom + atom, only_atom(atom)).tolist()) == {ax.DIAGONAL}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_regroup_agrees_with_torch(sizes, data):
    """Owners of a reshaped tensor's axes equal what torch's reshape does to a tensor of
    coordinates.
    """
    axes = [ax.fresh(size) for size in sizes]
    splits = data.draw(st.lists(st.integers(0, len(sizes)), max_size=2).map(sorted))
    borders = [0, *splits, len(sizes)]
    new = [torch.Size(sizes[a:b]).numel() for a, b in zip(borders, borders[1:], strict=False)]
    grouped = ax.regroup(axes, new)
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        coordinate = (
            torch.arange(size)
            .view([-1 if i == dim else 1 for i in range(len(sizes))])
            .expand(sizes)
            .reshape(new)
        )
        for position, axis in enumerate(grouped):
            owned = ax.owners(axis, only_atom(axes[dim]))
            if (owned >= 0).any():
                shape = [-1 if i == position else 1 for i in range(len(new))]
                assert torch.equal(owned.view(shape).expand(new), coordinate)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.data())
def test_cutting_and_joining_gives_the_axis_back(sizes, data):
    whole = ax.fresh(sum(sizes))
    rest, parts = whole, []
    for size in sizes[:-1]:
        head, rest = ax.cut(rest, size)
        parts.append(head)
    joined = ax.concatenate([*parts, rest])
    for atom in ax.atoms(whole):
        assert torch.equal(ax.owners(whole, atom), ax.owners(joined, atom))
