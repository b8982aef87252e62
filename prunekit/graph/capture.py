"""Capture a module's forward pass as an ATen graph without running or copying a weight."""

import copy
import inspect
import io
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.fx.config
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from prunekit.errors import TraceError, first_line
from prunekit.graph.choices import WAYS, EveryPositionChosen
from prunekit.model.compat import keep_frequencies
from prunekit.model.wrappers import without_hooks

try:  # private to torch (seen in 2.13): without it, tracing is only slower
    from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graphs
except ImportError:
    use_lazy_graphs = nullcontext  # type: ignore[assignment]

try:  # private to torch (seen in 2.13): without it, some models can't run on meta
    from torch._export.utils import _compiling_state_context as as_under_export
except ImportError:
    as_under_export = nullcontext  # type: ignore[assignment]

# What torch raises where the way of a forward pass depends on the numbers of a tensor.
_NUMBERS_NEEDED = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
)
WAY_OUT = (
    "; a module in it that does without them can be pruned by itself, "
    "with a list of its own inputs as calibration"
)
_OTHER_WAY = (
    "; other inputs may lead it another way (masks, which it makes itself otherwise), "
    "or a module in it can be pruned by itself"
)
_ON_META = partial(torch.device, "meta")  # the device of tensors that are made without one
_Casts = dict[str, torch.dtype]  # the path of a module → the type that a forward pass casts it to
_REGISTERED = ("_parameters", "_buffers", "_modules")


class InputsError(TraceError):
    """torch.export can't follow a forward pass, whose way other inputs may change."""


def meta_copy(model: nn.Module, *, parameters_only: bool = False) -> nn.Module:
    """Copy a module with all its tensors on the meta device; ties stay, no weight is copied.

    With `parameters_only`, buffers and other tensors keep their numbers. Otherwise there are none
    to tell how long a text is, so that rotary frequencies stay as they are.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            parameter.detach().to("meta"), requires_grad=parameter.requires_grad
        )
    if parameters_only:
        return copy.deepcopy(model, memo)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    for module in model.modules():
        for tensor in torch.utils._pytree.tree_leaves(
            [v for k, v in vars(module).items() if k not in _REGISTERED]
        ):
            if isinstance(tensor, Tensor):
                memo.setdefault(id(tensor), tensor.detach().to("meta"))
    copied = copy.deepcopy(model, memo)
    keep_frequencies(copied)
    return copied


class _ListsAsSlices(TorchFunctionMode):
    """Reads `x[:, [-2]]` as the slice that it is.

    The list of indices would become a constant, and meta does not keep a constant's numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if sum(isinstance(place, list) for place in places) == 1:
                args = (args[0], tuple(map(_as_slice, places)))
        return func(*args, **(kwargs or {}))


def _as_slice(place: Any) -> Any:
    """A list of consecutive positions as a slice; anything else as it is."""
    if not isinstance(place, list) or not place or not all(type(i) is int for i in place):
        return place
    first, last = place[0], place[-1]
    if place != list(range(first, first + len(place))) or first < 0 <= last:
        return place
    return slice(first, last + 1 or None)


@contextmanager
def _noting_lines(wanted: bool) -> Iterator[None]:
    """Whether torch notes, for each operator, the lines of code that called it."""
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    torch.fx.config.do_not_emit_stack_traces = not wanted
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


def capture(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    watch: Callable[[nn.Module], None] = lambda _: None,
    *,
    lines: bool = False,
) -> ExportedProgram:
    """Capture `model(*example_inputs)` or `model(**example_inputs)`, in evaluation mode.

    Args:
        model: the module.
        example_inputs: keyword arguments (a mapping) or positional ones (a tuple).
        watch: may put hooks on the copy of the model that is run.
        lines: whether operators know the lines of code that called them, which takes a quarter
            more time; it is for the message about a pass that can't be followed, so the first way
            in which it can be captured will do.

    Raises:
        TraceError: torch.export can't follow the module (data-dependent control flow, say).
    """
    errors: list[Exception] = []
    casts: _Casts = {}
    programs: list[ExportedProgram] = []
    ways = [*WAYS]
    while ways:
        way = ways.pop(0)
        skeleton, known = _make_skeleton(model, casts), len(casts)
        watch(skeleton)
        try:
            with _capturing(skeleton, casts, lines), way() as mode:
                program = _export(skeleton, example_inputs)
        except Exception as error:
            if len(casts) > known:
                ways.insert(0, way)
                continue
            errors.append(error)
            if _mixes_devices(error) and way is not _ON_META:
                ways = [_ON_META]
                continue
            if type(errors[0]).__name__ not in _NUMBERS_NEEDED and not programs:
                break
        else:
            if lines or not _count_unknown(program):
                return program
            programs.append(program)
        if isinstance(mode, EveryPositionChosen) and not mode.loops:
            break  # the ways after it differ in loops alone
    if programs:
        return min(programs, key=_count_unknown)
    if problem := _find_misnamed(model, example_inputs):
        raise TraceError(f"{type(model).__name__}: {problem}") from errors[0]
    raise _refuse(model, errors[0]) from errors[0]


def _make_skeleton(model: nn.Module, casts: _Casts) -> nn.Module:
    """The copy on meta that is captured, with the casts made that its forward pass would make."""
    skeleton = without_hooks(meta_copy(model)).eval()
    for path, dtype in casts.items():
        skeleton.get_submodule(path).to(dtype)
    return skeleton


def _refuse(model: nn.Module, error: Exception) -> TraceError:
    by_numbers = type(error).__name__ in _NUMBERS_NEEDED
    kind, way_out = (TraceError, WAY_OUT) if by_numbers else (InputsError, _OTHER_WAY)
    text = f"torch.export can't capture its forward pass: {_explain(error, by_numbers)}{way_out}"
    return kind(f"{type(model).__name__}: {text}")


def _find_misnamed(
    model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...]
) -> str | None:
    """What is wrong with the names of keyword arguments, and which ones a forward pass takes."""
    if not isinstance(example_inputs, Mapping):
        return None
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**example_inputs)
    except TypeError as error:
        return f"inputs: {error}; its forward pass takes {', '.join(signature.parameters)}"
    return None


def _export(
    skeleton: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...]
) -> ExportedProgram:
    """Capture the forward pass of a model on meta, on inputs of these shapes."""
    named = isinstance(example_inputs, Mapping)
    inputs = torch.utils._pytree.tree_map_only(
        Tensor,
        lambda t: t.to("meta"),
        ((), dict(example_inputs)) if named else (tuple(example_inputs), {}),
    )
    return torch.export.export(skeleton, *inputs, strict=False)


def _mixes_devices(error: Exception) -> bool:
    """Whether a pass on meta failed for a tensor that it makes without saying on which device."""
    return "cpu" in str(error) and "meta" in str(error) and "device" in str(error)


def _count_unknown(program: ExportedProgram) -> int:
    """How many operators of the captured pass read a number of a tensor, or give such a size."""
    reads = ("aten.item.default", "aten._local_scalar_dense.default")
    return sum(str(node.target) in reads or _has_unknown_size(node) for node in program.graph.nodes)


def _has_unknown_size(node: torch.fx.Node) -> bool:
    """Whether an operator gives a tensor that has a size which is no number."""
    tensors = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return any(
        isinstance(tensor, Tensor) and not all(type(size) is int for size in tensor.shape)
        for tensor in tensors
    )


@contextmanager
def _casting_what_differs(skeleton: nn.Module, casts: _Casts) -> Iterator[None]:
    """Let a module cast to the type that it has be itself: torch.export refuses any cast.

    Casts to another type, which it refuses, are noted: they can be made before.
    """
    cast = nn.Module.to
    paths = {module: path for path, module in skeleton.named_modules()}

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        kinds = {t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()}
        wanted = {*args, *kwargs.values()}
        if kinds == wanted:
            return self
        if self in paths and all(isinstance(dtype, torch.dtype) for dtype in wanted):
            casts[paths[self]] = min(wanted, key=str)
        return cast(self, *args, **kwargs)

    with patch.object(nn.Module, "to", to):
        yield


@contextmanager
def _capturing(skeleton: nn.Module, casts: _Casts, lines: bool) -> Iterator[None]:
    """Let torch.export go about its work quickly and in silence.

    The graph is read and never run: writing Python code for it, as torch.export does after each of
    its passes, would take a third of the time. Of a failure it prints the graph and logs more: that
    stays out of the terminal, unless PRUNEKIT_TRACEBACK=1 asks for it.
    """
    with ExitStack() as stack:
        stack.enter_context(_ListsAsSlices())
        stack.enter_context(_noting_lines(lines))
        stack.enter_context(use_lazy_graphs(True))
        stack.enter_context(_casting_what_differs(skeleton, casts))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if os.environ.get("PRUNEKIT_TRACEBACK") != "1":
            stack.enter_context(redirect_stderr(io.StringIO()))
            logger = logging.getLogger("torch")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        yield


def _explain(error: Exception, by_numbers: bool) -> str:
    """Why a capture failed, in one line, with the model's line of code where it did."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if not frame.filename.startswith(ours)]
    where = f" ({lines[-1].filename}, line {lines[-1].lineno})" if lines else ""
    if by_numbers:
        return f"it goes on by numbers, which tracing does not have{where}"
    return f"{first_line(error, named=isinstance(error, AssertionError))}{where}"
