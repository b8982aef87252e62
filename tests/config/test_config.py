import itertools

import pytest
from omegaconf import OmegaConf

from prunekit.config import GROUPS, build, check, compose, config_dir
from prunekit.errors import ConfigError
from prunekit.policies import Manual

CHOICES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((config_dir() / group).glob("*.yaml"))
    if (group, path.stem) != ("policy", "manual") and group != "experiment"
]


# One choice of every group a row, so that Hydra composes few configurations. Methods, which choose
# for other groups, are alone in theirs; experiments have a test of their own.
ROWS = [[chosen] for chosen in CHOICES if chosen[0] == "method"]
ROWS += [
    [chosen for chosen in row if chosen]
    for row in itertools.zip_longest(
        *([c for c in CHOICES if c[0] == group] for group in GROUPS if group != "method")
    )
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ",".join(map("=".join, row)))
def test_every_choice_composes_checks_and_builds(row):
    run = check(compose(["=".join(chosen) for chosen in row]))
    for name in ("importance", "policy", "compensation", "schedule"):
        build(getattr(run, name), name)


@pytest.mark.parametrize("name", [choice for group, choice in CHOICES if group == "model"])
def test_a_model_by_name_is_calibrated_on_c4(name):
    run = check(compose([f"model={name}", "model.trust_remote_code=true"]))
    text = run.data.calibration
    named = name != "demo"
    assert (run.model.path is not None, run.model.trust_remote_code) == (named, True)
    expected = ("c4", 256, 2048) if named else ("embedded", 128, 128)
    assert (text.corpus, text.samples, text.sequence_length) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.path=folder"], ("bookcorpus", 10, 128)),
        (["model=llama_7b"], ("bookcorpus", 10, 128)),
        (["model.path=folder", "data.calibration.samples=3"], ("bookcorpus", 3, 128)),
        ([], ("embedded", 128, 128)),
        (["model.path=folder", "data=embedded"], ("embedded", 128, 128)),
        (["model.path=folder", "data=c4"], ("c4", 256, 2048)),
        (["model.path=folder", "data.calibration.path=text.txt"], ("embedded", 128, 128)),
        (["model.path=folder", "data.calibration.mix={c4: 1}"], ("embedded", 128, 128)),
        (["model.path=folder", "method=slimgpt"], ("embedded", 128, 128)),
    ],
)
def test_llm_pruner_has_its_calibration_where_none_is_chosen(overrides, expected):
    run = check(compose(["method=llm_pruner", *overrides]))
    text = run.data.calibration
    assert (text.corpus, text.samples, text.sequence_length) == expected
    assert run.default_data == ("bookcorpus" if expected[0] == "bookcorpus" else None)


@pytest.mark.parametrize(
    ("method", "importance", "policy"),
    [
        ("slimgpt", "taylor_first", "window"),
        ("slimgpt", "magnitude", "uniform"),
        ("llm_pruner", "obs", "linear_decrease"),
        ("llm_pruner", "magnitude", "uniform"),
    ],
)
def test_groups_override_the_method(method, importance, policy):
    run = check(compose([f"method={method}", f"importance={importance}", f"policy={policy}"]))
    assert run.importance["_target_"].lower().endswith(importance.replace("_", ""))
    assert run.policy["_target_"].lower().endswith(policy.replace("_", ""))
    assert run.method_name == method


def swept():
    """Each value that an experiment sweeps over, in as few combinations as it takes."""
    for path in sorted((config_dir() / "experiment").glob("*.yaml")):
        sweeps = [
            [f"{key}={value}" for value in str(values).split(",")]
            for key, values in OmegaConf.load(path).hydra.sweeper.params.items()
            if "(" not in str(values)
        ]
        combinations = [*itertools.zip_longest(*sweeps)]
        if path.stem.startswith("paper_"):  # the others sweep over the same choices
            combinations = combinations[:1]
        for overrides in combinations:
            yield path.stem, [override for override in overrides if override]


@pytest.mark.parametrize(("experiment", "overrides"), swept())
def test_what_an_experiment_sweeps_over_composes_and_builds(experiment, overrides):
    run = check(compose([f"experiment={experiment}", *overrides]))
    for name in ("importance", "policy", "compensation", "schedule"):
        build(getattr(run, name), name)


def test_all_groups_of_the_design_exist():
    assert {path.name for path in config_dir().iterdir() if path.is_dir()} == set(GROUPS)


def test_seed_and_values_reach_their_places():
    run = check(compose(["seed=7", "method=random", "policy=manual", "policy.values=[1,2]"]))
    assert run.data.calibration.seed == 7
    assert run.importance["seed"] == 7
    assert build(run.policy, "policy") == Manual(values=[1, 2])


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("method=slimgtp", "method: unknown choice 'slimgtp': did you mean slimgpt"),
        ("policy=ramp", "available: expected_loss, linear_decrease, linear_increase"),
        ("hydra.searchpath=[/nope]", "hydra.searchpath: expected .*that exist; /nope does not"),
        ("hydra.searchpath=['file:///no,pe']", "file:///no,pe does not"),
        ("hydra.searchpath=[pkg://no.pe]", "pkg://no.pe does not"),
        ("groups=[]", "groups: expected one or more of block, attention, .*, got none"),
        ("eval.cache=5", "eval.cache: expected a folder, auto or null, got 5"),
        ("eval.batch_size=true", "eval.batch_size: expected a whole number ≥ 1 or auto, got True"),
        ("cost=null", "cost: unknown choice 'null': .*available: bytes"),
        ("experiment=null", "experiment: unknown choice 'null'"),
        ("importance=wanda2", "importance: unknown choice"),
        ("ratoi=0.2", "unknown key 'ratoi': did you mean ratio"),
        ("data.calibration.sample=3", "sample"),
        ("eval.max_tokens=0", "eval.max_tokens: expected a whole number"),
        ("+ratoi=0.2", "unknown key 'ratoi': did you mean ratio"),
        ("ratio=much", "much"),
        ("ratio=1.2", r"ratio: expected a number in \(0, 1\), got 1.2"),
        ("ratio=0", r"got 0$"),
        ("memory.stream=1", "memory.stream: expected true, false or auto, got 1"),
        ("ratio=nan", r"got nan"),
        ("task=purne", "did you mean prune"),
        ("groups=heads", "groups: unknown choice"),
        ("eval.window=1", "eval.window: expected a whole number ≥ 2, got 1"),
        ("data.calibration.samples=0", "data.calibration.samples: expected a whole number ≥ 1"),
        ("data.calibration.samples=many", "samples: expected a whole number, got 'many'"),
        ("ratio=20%", "^ratio: expected a number, got '20%'"),
        ("eval.speed=maybe", "^eval.speed: expected true or false, got 'maybe'"),
        ("ratio", "^expected KEY=VALUE, got 'ratio'; --help says more"),
        ("eval.prompts=Hello, world!", "^eval.prompts: can't read .*may need quotes: "),
        ("method=slimgpt,random", "expected one value; with -m each is a run, and method=.* list"),
        ("scope.min_unit=3", "^unknown key 'scope.min_unit' of the chosen scope: did you mean min"),
        (
            "recovery.epochs=2",
            "^unknown key 'recovery.epochs' of the chosen recovery: it has no",
        ),
        ("vocabulary.corpora=a.txt", "groups=block does not act on it; expected groups=vocab"),
        ("eval.latency.nwe=3", "^unknown key 'eval.latency.nwe': did you mean new"),
        (
            "eval.latency=true",
            "^eval.latency: expected options, such as eval.latency.batch=…, got T",
        ),
        ("data.calibration=c4", "^data.calibration: expected options, .* got 'c4'"),
        ("hydra.swep.dir=x", "^unknown key 'hydra.swep.dir': did you mean sweep"),
        ("method=SlimGPT", "^method: unknown choice 'SlimGPT': did you mean slimgpt"),
        ("model=meta-llama/Llama-2-7b", "hub is model.path=meta-llama/Llama-2-7b; "),
    ],
)
def test_mistakes_are_one_clear_line(override, match):
    with pytest.raises(ConfigError, match=match) as caught:
        check(compose([override]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "section", "match"),
    [
        (["policy=window", "policy.start=40"], "policy", "expected 0 ≤ start < end"),
        (["policy.low_share=2"], "policy", r"policy.low_share: expected a number in \[0, 1\]"),
        (["importance.heads=exakt"], "importance", "did you mean exact"),
        (["+importance.colour=red"], "importance", "colour"),
        (["policy=manual"], "policy", "manual expects policy.values or policy.path"),
        (["schedule.damping=-1"], "schedule", "expected a number ≥ 0"),
        (["schedule.damping=abc"], "schedule", "expected a number ≥ 0, got 'abc'"),
    ],
)
def test_arguments_that_do_not_fit(overrides, section, match):
    run = check(compose(overrides))
    with pytest.raises(ConfigError, match=match):
        build(getattr(run, section), section)


def test_composed_configuration_has_no_loose_ends():
    config = compose([])
    assert OmegaConf.missing_keys(config) == set()


def test_what_is_done_to_a_configuration_does_not_change_the_next_one():
    chosen = ["ratio=0.3", "output_dir=out"]
    first = compose(chosen)
    first.ratio = 0.7
    first.eval.tasks = ["piqa"]
    check(first).importance["_target_"] = "elsewhere"
    assert check(compose(chosen)) == check(compose([*chosen, "seed=0"]))
    assert compose(chosen).ratio == 0.3


def test_one_corpus_needs_no_brackets():
    assert check(compose(["eval.corpora=/some/file.txt"])).eval.corpora == ["/some/file.txt"]


def test_a_ratio_beside_a_target_is_refused():
    with pytest.raises(ConfigError, match=r"expected either ratio or target\.bytes, got both"):
        compose(["ratio=0.3", "target.bytes=5e6"])
