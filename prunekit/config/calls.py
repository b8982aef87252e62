"""The functions of the Python API: an override that a function would ignore is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from prunekit.config.compose import compose
from prunekit.config.overrides import check_acted_on, check_strings, split_overrides
from prunekit.errors import ConfigError

_ALWAYS = frozenset({"seed", "imports", "hydra.searchpath"})
# The choices that a method is made of.
_METHOD = frozenset({"importance", "policy", "scope", "cost", "compensation", "schedule"})
_CUT = _METHOD | {"ratio", "target", "target_shape", "groups", "shapes", "method_name"}
# Keys that only say how a model is loaded from a folder or the hub.
_PLACING = frozenset({"device", "dtype"})
_TRUST = frozenset({"model.trust_remote_code", "model.dequantize"})
_LOADING = _PLACING | _TRUST
_WRITING = frozenset({"export", "resume"})
_RESULT = "for the result call"


@dataclass(frozen=True, kw_only=True)
class ApiCall:
    """One function of the API.

    Attributes:
        name: the function, for messages.
        acts_on: dotted keys of the configuration that it acts on, with all that lies below them.
            Closed by default: an override of any other key is an error.
        instead: dotted key → what to do instead, for that error; one that lies below a key of
            `acts_on` is an exception from it.
    """

    name: str
    acts_on: frozenset[str]
    instead: Mapping[str, str]

    def compose(self, overrides: Sequence[str], arguments: Mapping[str, str]) -> DictConfig:
        """Compose the configuration of a call.

        Args:
            overrides: the strings that the caller gave.
            arguments: group → choice, and key → value, from the other arguments of the function.

        Raises:
            ConfigError: an override that the function would not act on, or an unknown choice.
        """
        check_strings(overrides)
        check_acted_on(overrides, self.name, self.acts_on, self.instead)
        twice = {key for key, _ in split_overrides(overrides)} & arguments.keys()
        for key in twice:
            raise ConfigError(f"{key}: given twice, as an argument of {self.name} and by overrides")
        return compose([*(f"{key}={value}" for key, value in arguments.items()), *overrides])

    def without(self, keys: frozenset[str], instead: str) -> ApiCall:
        """The same function, which does not act on these keys; `instead` tells what to do."""
        advice = {**self.instead, **dict.fromkeys(keys, instead)}
        return replace(self, acts_on=self.acts_on - keys, instead=advice)

    def with_object(self, key: str, common: frozenset[str] = frozenset()) -> ApiCall:
        """The same function with an object in place of a section, but for the keys `common`."""
        advice = f"given twice: {key} was given as an object; set its options there"
        call = self.without(frozenset({key}), advice)
        return replace(call, acts_on=call.acts_on | common)

    def on_loaded_model(self) -> ApiCall:
        """The same function on a model that is in memory already."""
        moved = self.without(_PLACING, "the model is loaded already: call model.to(…) before")
        return moved.without(_TRUST, "the model is loaded already: give it to from_pretrained")

    def without_folder(self) -> ApiCall:
        """The same function where nothing is written."""
        return self.without(_WRITING, f"give {self.name} a folder, out=…")


_ELSEWHERE = {
    "task": "each task is a function: prune, evaluate, recover, export, prune_checkpoint",
    "plans": "compare plans on the command line: task=diff",
    "experiment": "sweep on the command line: -m experiment=…",
    "objective": "sweep on the command line: -m hydra/sweeper=optuna …",
    "hydra": "only hydra.searchpath counts here",
    "recovery": f"{_RESULT} prunekit.recover",
    "eval": f"{_RESULT} prunekit.evaluate",
    "export": f"{_RESULT} prunekit.export",
    "resume": "only prunekit.prune, recover and prune_checkpoint go on with what they left",
    "memory": "only pruning keeps activations: prunekit.prune, prunekit.prune_checkpoint",
    "data": "only prunekit.prune_checkpoint loads calibration text",
    "corpora": "only functions that load texts by name use it",
    "default_data": "presets set it; prunekit.prune_checkpoint takes data=…",
    "vocabulary": "tokens go by texts: prunekit.prune_vocabulary, prunekit.prune_checkpoint",
    **dict.fromkeys(_CUT, "it says how a model is pruned: prunekit.prune"),
    "method": "it says how a model is pruned: prunekit.prune(method=…)",
}
PRUNE = ApiCall(
    name="prunekit.prune",
    acts_on=_ALWAYS
    | _CUT
    | {"resume", "memory.budget", "memory.host", "memory.folder", "data.calibration.batch_size"},
    instead=_ELSEWHERE
    | {
        "method": "give it as an argument: prunekit.prune(method=…)",
        "model": "the model is the first argument; to prune a folder: prunekit.prune_checkpoint",
        "data": "the data are the argument calibration=…",
        "corpora": "the data are the argument calibration=…",
        "device": "the model is pruned where it is: call model.to(device) before",
        "dtype": "the model is pruned in the type it has: call model.to(dtype) before",
        "output_dir": f"{_RESULT} prunekit.save_pretrained",
        "memory.stream": "the model is loaded already: prunekit.prune_checkpoint streams a folder",
    },
)
PRUNE_CHECKPOINT = ApiCall(
    name="prunekit.prune_checkpoint",
    acts_on=_ALWAYS
    | _CUT
    | _LOADING
    | {"resume", "memory", "data", "corpora", "vocabulary", "recovery", "eval", "export"},
    instead=_ELSEWHERE
    | {
        "method": "give it as an argument: prunekit.prune_checkpoint(method=…)",
        "eval.baseline": "the dense model is the first argument",
        "model.path": "the folder is the first argument",
        "model": "the folder is the first argument",
        "output_dir": "the folder of the run is the second argument",
    },
)
EVALUATE = ApiCall(
    name="prunekit.evaluate",
    acts_on=_ALWAYS | _LOADING | {"eval", "corpora"},
    instead=_ELSEWHERE
    | {
        "export": "call prunekit.export",
        "recovery": "call prunekit.recover",
        "model": "the model is the first argument",
        "output_dir": "give a folder as an argument: out=…",
    },
)
RECOVER = ApiCall(
    name="prunekit.recover",
    acts_on=_ALWAYS | _LOADING | _WRITING | {"recovery", "eval", "corpora"},
    instead=_ELSEWHERE
    | {
        "model": "the model is the first argument",
        "output_dir": "give a folder as an argument: out=…",
    },
)
EXPORT = ApiCall(
    name="prunekit.export",
    acts_on=_TRUST | {"imports", "hydra.searchpath", "export"},
    instead=_ELSEWHERE
    | {
        "model": "the model is the first argument",
        "output_dir": "the folder is the second argument",
        "recovery": "call prunekit.recover before",
        "eval": "call prunekit.evaluate",
        "seed": "nothing in it is random",
        "device": "a model is exported where it is",
        "dtype": "the format says what it stores: export.dtype",
    },
)
CALLS = (PRUNE, PRUNE_CHECKPOINT, EVALUATE, RECOVER, EXPORT)
