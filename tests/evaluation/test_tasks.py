import copy
import importlib.util
import json
import sys
import types

import pytest
import torch
from conftest import command_line, tiny_llama
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prunekit.errors import ConfigError, DataError
from prunekit.evaluation.cache import Cache
from prunekit.evaluation.task_loading import load_tasks
from prunekit.evaluation.tasks import check_tasks, evaluate_tasks
from prunekit.runtime import console

SEVEN = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
PIQA = [
    {
        "goal": f"open jar {i}",
        "sol1": "twist it" * (i % 3 + 1),
        "sol2": "hit it",
        "label": int(i % 3 == 0),
    }
    for i in range(12)
]
MMLU = [
    {
        "question": f"Which of {i}?",
        "choices": ["a", "bb", "c", "dd"],
        "answer": i % 4,
        "subject": subject,
    }
    for i, subject in enumerate(["anatomy"] * 6 + ["virology"] * 2)
]


class Memory(Cache):
    """In a dictionary, through JSON."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def get(self, key):
        return json.loads(self.kept[key]) if key in self.kept else None

    def put(self, key, value):
        self.kept[key] = json.dumps(value)


@pytest.fixture(scope="module")
def characters():
    """Each printable character is a token; a text starts with <s>."""
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(32 + i): i + 2 for i in range(95)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model():
    model = tiny_llama(layers=1)
    model.config.max_position_embeddings = 512
    return model


def write(folder, task="piqa", split="validation", rows=PIQA):
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@torch.no_grad()
def by_hand(model, tokenizer, rows):
    """PIQA's acc and acc_norm, one sequence at a time in float64."""
    model = copy.deepcopy(model).double()
    hits = torch.zeros(2)
    for row in rows:
        question, scores = f"Question: {row['goal']}\nAnswer:", []
        for solution in (row["sol1"], row["sol2"]):
            ids = tokenizer(f"{question} {solution}", return_tensors="pt")["input_ids"]
            begin = len(tokenizer(question)["input_ids"])
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
            total = sum(logs[at - 1, ids[0, at]].item() for at in range(begin, ids.shape[1]))
            scores.append((total, total / len(solution)))
        hits += torch.tensor(
            [max((0, 1), key=lambda k: scores[k][by]) == row["label"] for by in (0, 1)]
        )
    return (hits / len(rows)).tolist()


def count_calls(model):
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_accuracy_is_the_hand_written_one(tmp_path, model, characters):
    write(tmp_path)
    cache = Memory()
    row = evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path, cache=cache)["piqa"]
    acc, acc_norm = by_hand(model, characters, PIQA)
    (kept,) = (json.loads(value) for value in cache.kept.values())
    assert acc != acc_norm
    assert kept["acc,none"] == pytest.approx(acc)
    assert row.value == pytest.approx(acc_norm)
    assert row.stderr == pytest.approx((acc_norm * (1 - acc_norm) / 11) ** 0.5)
    assert (row.metric, row.samples, row.fewshot) == ("acc_norm", 12, 0)


def test_seven_tasks_from_local_files(data):
    folder = data / "models" / "stories260K"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    check_tasks(SEVEN, data / "tasks")
    cache = Memory()
    rows = evaluate_tasks(model, tokenizer, SEVEN, tasks_dir=data / "tasks", limit=20, cache=cache)
    assert list(rows) == [*SEVEN, "average"]
    assert {name for name in SEVEN if rows[name].metric == "acc_norm"} == {
        "piqa",
        "hellaswag",
        "arc_challenge",
        "openbookqa",
    }
    assert rows["average"].value == pytest.approx(sum(rows[name].value for name in SEVEN) / 7)
    assert rows["average"].metric == "mean of acc and acc_norm"
    assert all(rows[name].samples == 20 for name in SEVEN)
    import pyarrow.parquet

    piqa = pyarrow.parquet.read_table(data / "tasks" / "piqa" / "validation.parquet").to_pylist()[
        :20
    ]
    kept = json.loads(list(cache.kept.values())[SEVEN.index("piqa")])
    assert [kept["acc,none"], kept["acc_norm,none"]] == pytest.approx(
        by_hand(model, tokenizer, piqa)
    )


def test_a_group_is_weighted_by_size_and_runs_the_members_that_are_there(
    tmp_path, model, characters, capsys
):
    write(tmp_path, "mmlu", "test", MMLU)
    write(tmp_path, "mmlu", "dev", MMLU)
    write(tmp_path)
    model.config.max_position_embeddings = 1024
    console.speak()
    rows = evaluate_tasks(model, characters, ["mmlu"], tasks_dir=tmp_path, fewshot=2)
    console.speak(False)
    said = capsys.readouterr().out
    assert "2 of 57 tasks" in said
    assert "mmlu_anatomy" in said
    assert list(rows) == ["mmlu", "mmlu_anatomy", "mmlu_virology"]
    anatomy, virology = rows["mmlu_anatomy"], rows["mmlu_virology"]
    assert (anatomy.samples, virology.samples, rows["mmlu"].samples) == (6, 2, 8)
    assert rows["mmlu"].value == pytest.approx((6 * anatomy.value + 2 * virology.value) / 8)
    assert anatomy.group == virology.group == "mmlu"
    assert rows["mmlu"].fewshot == 2
    shots = load_tasks(["mmlu_anatomy"], tmp_path, fewshot=2)[0].task
    shots.build_all_requests(limit=1)
    assert shots.instances[0].args[0].count("Answer:") == 3


def test_few_shot_examples_never_come_from_the_questions(tmp_path):
    write(
        tmp_path,
        "arc_easy",
        rows=[{"question": "q", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"}],
    )
    check_tasks(["arc_easy"], tmp_path)  # its test split is not there, the validation split is
    with pytest.raises(DataError, match="few-shot examples of arc_easy need train.parquet"):
        check_tasks(["arc_easy"], tmp_path, fewshot=1)


def test_known_results_are_not_computed_again(tmp_path, model, characters):
    write(write(tmp_path), "mmlu", "test", MMLU)
    cache, calls = Memory(), count_calls(model)
    options = {"tasks_dir": tmp_path, "cache": cache, "fewshot": 0}
    first = evaluate_tasks(model, characters, ["mmlu", "piqa"], **options)
    assert calls
    assert len(cache.kept) == 3  # two subjects of mmlu, and piqa
    calls.clear()
    assert evaluate_tasks(model, characters, ["mmlu", "piqa"], **options) == first
    assert not calls
    write(tmp_path, rows=PIQA[:5])
    again = evaluate_tasks(model, characters, ["mmlu", "piqa"], **options)
    assert calls
    assert again["piqa"].samples == 5
    assert again["mmlu"] == first["mmlu"]


def test_the_key_tells_all_that_decides_the_result(tmp_path, model, characters):
    first, second = (
        write(tmp_path / "1"),
        write(tmp_path / "2", rows=[{**PIQA[0], "label": 0}, *PIQA[1:]]),
    )
    other = copy.deepcopy(characters)
    other.backend_tokenizer.post_processor = None

    def key(tokenizer=characters, folder=first, **options):
        evaluate_tasks(
            model, tokenizer, ["piqa"], tasks_dir=folder, cache=(cache := Memory()), **options
        )
        return next(iter(cache.kept))

    write(first, split="train", rows=PIQA[:6])
    plain = key()
    keys = [
        plain,
        key(folder=second),
        key(other),
        key(limit=4),
        key(fewshot=1),
        key(fewshot=1, seed=1),
    ]
    assert len(set(keys)) == len(keys)
    characters.backend_tokenizer.enable_truncation(3)  # as any call with truncation leaves it
    assert key() == plain
    characters.backend_tokenizer.no_truncation()
    assert key(limit=len(PIQA)) == plain
    write(first, rows=[*PIQA[:3], {**PIQA[3], "goal": "shut it"}, *PIQA[4:]])
    assert key() != plain


def test_the_model_stays_as_it_was(tmp_path, model, characters):
    write(tmp_path)
    model = model.to(torch.bfloat16).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {
        name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()
    }
    random = torch.get_rng_state()
    evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path, batch_size=5)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert value.data_ptr() == weights[name][0]
        assert torch.equal(value, weights[name][1])
    assert torch.equal(torch.get_rng_state(), random)
    assert characters.pad_token is None
    assert "tie_weights" not in vars(model)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: tried"),
    ],
)
def test_out_of_memory_halves_the_batch(tmp_path, model, characters, monkeypatch, error):
    write(tmp_path)
    expected = evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path, batch_size=1)
    forward, sizes = model.forward, []

    def small(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 16:
            raise error
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    assert evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path) == expected
    assert max(sizes) == 24
    with pytest.raises(
        DataError, match="task piqa: out of memory with eval.batch_size=20: set .*=10 or auto"
    ):
        evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path, batch_size=20)


def test_a_window_that_is_too_small_is_told(tmp_path, model, characters):
    model.config.max_position_embeddings = 8
    write(tmp_path)
    with pytest.raises(DataError, match="task piqa: too long for the model's window of 8 tokens"):
        evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path)


def without(rows, *columns):
    return [{key: value for key, value in row.items() if key not in columns} for row in rows]


HELLASWAG = [{"activity_label": "a", "ctx_a": "b", "endings": ["c", "d", "e", "f"], "label": "1"}]
BOOLQ = [{"passage": "p", "question": "q"}]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("piqa", without(PIQA, "goal", "sol2"), "task piqa: .*'goal'.*the columns are sol1, label"),
        ("piqa", without(PIQA, "label"), "task piqa: .*'label'; the columns are goal, sol1, sol2"),
        ("boolq", BOOLQ, "task boolq: .*'label'; the columns are passage, question"),
        (
            "hellaswag",
            HELLASWAG,
            "task hellaswag: .*'ctx_b'; the columns are activity_label, ctx_a",
        ),
        (
            "winogrande",
            [{"sentence": "a _ b", "option1": "c"}],
            "task winogrande: .*'answer'; the columns are sentence, option1",
        ),
        ("piqa", [{"goal": 1}, 5], "can't be read"),
        ("piqa", [], "expected rows, found none"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, task, rows, message):
    write(tmp_path, task, rows=rows)
    with pytest.raises(DataError, match=message) as raised:
        check_tasks([task], tmp_path)
    assert f"{task}/validation.jsonl" in str(raised.value).replace("\\", "/")
    assert "\n" not in str(raised.value)


def test_rows_that_cannot_be_turned_into_requests(tmp_path, model, characters):
    write(tmp_path, rows=[*PIQA, {**PIQA[0], "goal": None, "label": None}])
    evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path, limit=2)
    rows = [
        {"question": "q", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": key}
        for key in "AB"
    ]
    write(tmp_path, "arc_easy", rows=rows)
    with pytest.raises(
        DataError, match=r"validation.jsonl: task arc_easy: ValueError: 'B' is not in"
    ):
        evaluate_tasks(model, characters, ["arc_easy"], tasks_dir=tmp_path)


def test_names_and_folders_that_are_not_there(tmp_path, model, characters):
    write(tmp_path)
    for names, folder, kind, message in [
        (["pika"], None, ConfigError, "unknown task 'pika'.*piqa"),
        ([], None, ConfigError, "at least one name"),
        (["piqa", "piqa"], None, ConfigError, "piqa is asked for twice"),
        (["humaneval"], None, ConfigError, "runs code"),
        (["hellaswag"], tmp_path, DataError, "expected a folder 'hellaswag'.*found 2, piqa"),
        (["mmlu"], tmp_path, DataError, "expected a folder 'mmlu'"),
        (["piqa"], tmp_path / "no", DataError, "no such folder"),
        (
            ["ai2_arc"],
            write(tmp_path / "2", "arc_easy"),
            DataError,
            "expected a folder 'arc_challenge'",
        ),
    ]:
        with pytest.raises(kind, match=message):
            check_tasks(names, folder)
    with pytest.raises(
        DataError, match="can't load allenai/sciq from the hub .eval.tasks_dir takes local files."
    ):
        evaluate_tasks(model, characters, ["sciq"], limit=1)
    with pytest.raises(
        ConfigError, match="eval.batch_size: expected a positive number or auto, got 0"
    ):
        evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path, batch_size=0)


def test_an_unknown_task_is_one_line_on_the_command_line(tmp_path):
    failed = command_line("eval.tasks=[picqa]", "output_dir=out", cwd=tmp_path)
    assert failed.returncode == 2, failed.stdout
    (line,) = failed.stderr.strip().splitlines()
    assert "eval.tasks: unknown task 'picqa'" in line and "the nearest: piqa" in line
    assert not (tmp_path / "out").exists()


def test_longbench_generates_and_names_its_metric(tmp_path, model, characters, monkeypatch):
    row = {"context": "Tim has a dog. ", "question": "Who has a dog?", "answers": ["Tim"]}
    write(tmp_path, "longbench_2wikimqa", "test", [row, row])
    model.config.max_position_embeddings = 1024
    for name in ("jieba", "rouge", "fuzzywuzzy"):
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            stub.Rouge = stub.fuzz = None
            monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics", raising=False)
    rows = evaluate_tasks(model, characters, ["longbench"], tasks_dir=tmp_path)
    assert rows["longbench_2wikimqa"].metric == "qa_f1_score"
    assert rows["longbench"].metric == "score"
    assert 0 <= rows["longbench"].value == rows["longbench_2wikimqa"].value <= 1
    for number, (task, bad, message) in enumerate(
        [
            ("longbench_2wikimqa", without([row], "answers")[0], "'answers'"),
            ("longbench_trec", row | {"input": "a"}, "KeyError: 'all_classes'"),
            ("longbench_2wikimqa", row | {"answers": [5]}, "AttributeError: 'int'"),
        ]
    ):
        folder = write(tmp_path / str(number), task, "test", [bad])
        with pytest.raises(DataError, match=f"test.jsonl: task {task}: .*{message}") as raised:
            evaluate_tasks(model, characters, [task], tasks_dir=folder)
        assert "\n" not in str(raised.value)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics")
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match="longbench_lcc: a package is missing: .*jieba"):
        check_tasks(["longbench"], None)
