"""Calibration windows come from all over a text, however long its documents are."""

from collections import Counter

import pytest
import torch
from test_data import Characters

from prunekit.data.tokens import calibration_windows
from prunekit.data.windows import draw_windows
from prunekit.errors import DataError

SEPARATOR = ord("\n")


def letters(document, length):
    """A text of one letter, which tells the document."""
    return chr(200 + document) * length


def origins(windows):
    """Document → the number of windows that hold tokens of it."""
    return Counter(token - 200 for row in windows.ids for token in set(row.tolist()) - {SEPARATOR})


def draw(lengths, samples, length, seed=0):
    documents = [letters(document, size) for document, size in enumerate(lengths)]
    return draw_windows(documents, Characters(), samples, length, seed)


def test_windows_are_seeded_crops():
    documents = ["a" * 3, "".join(map(chr, range(200, 240))), "b" * 50]
    one, two = (calibration_windows(documents, Characters(), 12, 10, seed) for seed in (3, 3))
    assert torch.equal(one, two)
    assert one.shape == (12, 10)
    assert not torch.equal(one, calibration_windows(documents, Characters(), 12, 10, 4))
    for row in one.tolist():
        assert row == [98] * 10 or row == list(range(row[0], row[0] + 10))


def test_one_long_document_among_many_short_ones_is_not_all_that_is_seen():
    windows = draw([4] * 300 + [40], 32, 10)
    assert windows.ids.shape == (32, 10)
    assert len(origins(windows)) == windows.documents > 32
    assert set(origins(windows).values()) == {1}
    assert windows.distinct_tokens == len(windows.ids.unique())
    assert windows.warning is None


def test_long_documents_give_one_window_each():
    windows = draw([20] * 40, 32, 10)
    assert set(origins(windows).values()) == {1}
    assert windows.documents == 32


def test_short_documents_that_hold_hardly_any_text_are_left_out():
    windows = draw([3] * 5 + [50] * 40, 32, 10)
    assert all(document >= 5 for document in origins(windows))


@pytest.mark.parametrize("lengths", [[100, 300], [100, 300, *[4] * 50]])
def test_no_document_gives_more_than_its_share_of_the_text(lengths):
    windows = draw(lengths, 40, 10)
    text = windows.available
    seen = origins(windows)
    assert seen[0] == pytest.approx(40 * 100 / text, abs=1)
    assert seen[1] == pytest.approx(40 * 300 / text, abs=1)
    assert windows.ids.shape == (40, 10)


def test_text_that_is_too_short_is_an_error_and_repeated_windows_a_warning():
    windows = draw([3] * 10, 4, 10)
    assert windows.ids.shape == (4, 10)
    assert windows.warning is None
    assert "15 of the 16 windows repeat others" in draw([10], 16, 10).warning
    text = "".join(map(chr, range(200, 300)))
    assert draw_windows([text], Characters(), 10, 10, 0).warning is None
    overlapping = draw_windows([text], Characters(), 11, 10, 0)
    assert len(overlapping.ids.unique(dim=0)) == 11
    assert "the windows overlap: they hold 110 tokens, the text has 100" in overlapping.warning
    with pytest.raises(DataError, match="the text has 8 tokens, one window needs 64"):
        draw([3, 3], 4, 64)
    with pytest.raises(DataError, match="expected samples ≥ 1"):
        draw([30], 0, 10)
