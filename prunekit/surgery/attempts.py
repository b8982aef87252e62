"""Attempts at a cut, one strategy after another, until a check passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from prunekit.graph import CouplingGraph
from prunekit.surgery.attributes import Attempt, attempts
from prunekit.surgery.changes import Changes, Guess
from prunekit.surgery.check import Check, Run, catch_fault, expectations
from prunekit.surgery.cut import cut_model
from prunekit.surgery.fault import Fault

Cut = Callable[[Attempt], Changes]  # cuts as an attempt says; on an error nothing is changed


def cut_and_check(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, list[int]],
    run: Run | None = None,
) -> Fault | None:
    """Cut until the model computes what the masked model computes, or tell what is wrong.

    Args:
        model: the model, not cut yet; as it was where a fault is returned.
        graph: its graph.
        removed: name of a group → unit indices.
        run: runs the part of the model that is cut, where the rest is not loaded; then no units are
            counted.
    """
    fault = None
    for expectation in expectations(model, graph, removed, run):
        check = expectation.check if run is None else expectation.check_outputs
        cut = partial(cut_model, model, graph, removed)
        fault = cut_until_right(cut, check, expectation.check_outputs)
        if fault is None or not fault.runs:
            break
    return fault


def cut_until_right(cut: Cut, check: Check, quick: Check | None = None) -> Fault | None:
    """Cut as the first strategy says whose result passes the check.

    Args:
        cut: cuts as an attempt says; on an error it leaves the model as it was.
        check: tells what is wrong with the cut model.
        quick: a part of the check that takes less time, if there is one.

    Returns:
        None once the model is cut. Where no attempt passes, the fault of the first attempt, which
        made no guess, and the model is as it was.
    """
    faults: list[Fault] = []
    guessed: list[str] = []
    for attempt in attempts(guessed):
        changes, fault = try_cut(partial(cut, attempt), check, quick)
        if fault is None:
            return None
        faults.append(fault)
        guessed += [guess.attribute for guess in changes.guesses] if changes else []
    return faults[0]


def try_cut(
    cut: Callable[[], Changes], check: Check, quick: Check | None = None
) -> tuple[Changes | None, Fault | None]:
    """Cut and check; a cut with a fault is undone, and guesses that are not needed taken back.

    Returns:
        What was changed, None where the cut itself failed, and the fault.
    """
    made: list[Changes] = []

    def cut_and_check() -> Fault | None:
        made.append(cut())
        return check()

    is_right = False
    try:
        fault = catch_fault(cut_and_check)
        if fault is None:
            _revert_needless_guesses(made[0], check, quick or check)
        is_right = fault is None
    finally:  # after an interruption too
        if made and not is_right:
            made[0].undo()
    return (made[0] if made else None), fault


def _revert_needless_guesses(changes: Changes, check: Check, quick: Check) -> None:
    """Take back one guess after another; those stay without which the check fails.

    The whole check is made once, behind the quick ones; after each guess only where it fails then.
    """
    guesses = list(changes.guesses)
    changes.guesses[:] = _find_needed(guesses, quick)
    if len(changes.guesses) < len(guesses) and quick != check and catch_fault(check):
        for guess in guesses:
            guess.repeat()
        changes.guesses[:] = _find_needed(guesses, check)


def _find_needed(guesses: Sequence[Guess], check: Check) -> list[Guess]:
    """Take back one guess after another; those without which a check fails are made again."""
    needed = []
    for guess in guesses:
        guess.revert()
        if catch_fault(check):
            guess.repeat()
            needed.append(guess)
    return needed
