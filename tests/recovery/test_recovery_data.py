import json
from types import SimpleNamespace

import pytest
import torch
from recovery_helpers import (
    Letters,
    clone,
    logits,
    pruned,
    run,
    settings,
    small,
    state,
    texts,
    tiny_gpt2,
)

from prunekit.data.corpora import load_corpus, open_records
from prunekit.errors import ConfigError, DataError
from prunekit.recovery.data import collate, load_data, pack
from prunekit.recovery.examples import Example, make_examples, write_prompt
from prunekit.recovery.settings import Recovery

RECORDS = [
    {"instruction": "Add.", "input": "1 2", "output": "three"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
]


def decode(ids):
    return "".join(chr(i - 2) if i > 1 else "^$"[i] for i in ids)


class Plain(Letters):
    """Code points, so that rows can be read back."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        return {"input_ids": [0] * add_special_tokens + [2 + ord(c) for c in text]}


class Merging(Plain):
    """Joins a line break with the letter after it, as a byte-pair encoding may: the prompt's last
    token changes.
    """

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = super().__call__(text, add_special_tokens)["input_ids"]
        if isinstance(text, list):
            return {"input_ids": ids}
        return {"input_ids": ids[:-2] + [900] if text.endswith("\nZ") else ids}


def test_instructions_have_the_loss_on_the_response_and_the_end():
    with_input, without = make_examples(RECORDS, Recovery(length=400), Plain(), "x")
    text = decode(with_input.ids.tolist())
    assert text.startswith("^Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\nthree$")
    predicted = [
        i
        for i, label in zip(with_input.ids.tolist(), with_input.labels.tolist(), strict=True)
        if label >= 0
    ]
    assert decode(predicted) == "three$"
    assert "Input" not in decode(without.ids.tolist())
    assert decode(without.ids.tolist()[without.first :]) == "hi$"


def test_a_token_that_spans_the_border_is_the_responses():
    [example] = make_examples([{"instruction": "x", "output": "Z"}], Recovery(), Merging(), "x")
    assert example.ids[example.first :].tolist() == [900, 1]


def test_responses_that_are_cut_off_are_dropped_and_said_once(monkeypatch):
    said = []
    monkeypatch.setattr("prunekit.recovery.examples.say", said.append)
    long = {"instruction": "w" * 400, "output": "never seen"}
    examples = make_examples(
        [*RECORDS, long, {"instruction": "a", "output": " "}], Recovery(length=300), Plain(), "x"
    )
    assert len(examples) == 2
    assert said == ["recovery corpus x: 2 of 4 records have no response in the first 300 tokens"]
    cut = make_examples(RECORDS, Recovery(length=len(write_prompt(RECORDS[0])) + 3), Plain(), "x")
    assert decode(cut[0].ids[cut[0].first :].tolist()) == "th"


@pytest.mark.parametrize(
    ("records", "options", "match"),
    [
        (
            [{"instruction": "a"}],
            {"format": "alpaca"},
            "record 1 has no text 'output'.*; it has: instruction",
        ),
        ([*RECORDS, {"text": "a"}], {"format": "alpaca"}, "record 3 has no text 'instruction'"),
        ([{"instruction": "a", "output": ""}], {}, "every record's 'output' is empty"),
        ([], {}, "expected records, found none"),
        (RECORDS, {"length": 20}, "nothing is left to predict in recovery.length=20 tokens"),
        ([{"other": "a"}], {}, "expected a text field 'text', found other"),
        ([{"text": " "}], {}, "nothing is left to predict"),
    ],
)
def test_corpora_that_cannot_be_used(tmp_path, records, options, match):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    with pytest.raises(DataError, match=match) as caught:
        load_data(Recovery(path=str(path), **options), Plain(), {}, 0)
    assert "a.json" in str(caught.value)


def test_text_is_joined_or_one_document_a_row():
    records = [{"text": "abcd"}, {"text": "efg"}, {"text": " "}]
    joined = make_examples(records, Recovery(length=4), Plain(), "x")
    assert [decode(e.ids.tolist()) for e in joined] == ["abcd", "\n\nef"]
    separate = make_examples(records, Recovery(length=4, join=False), Plain(), "x")
    assert [decode(e.ids.tolist()) for e in separate] == ["^abc", "^efg"]
    assert separate[0].labels.tolist()[0] == -100
    assert make_examples(records[1:2], Recovery(length=9, join=False), Plain(), "x")[0].ids[-1] == 1


def test_held_out_examples_do_not_depend_on_the_samples(tmp_path):
    some, all_ = (
        load_data(settings(texts(tmp_path), samples=n), Letters(), {}, 3) for n in (6, None)
    )
    assert [row[0].ids.tolist() for row in some.validation] == [
        row[0].ids.tolist() for row in all_.validation
    ]
    assert (some.examples, len(some.training), all_.examples) == (6, 8, 20)
    assert all((row[0].labels == -100).all() for row in some.training[6:])
    assert [r[0].ids.tolist() for r in some.training[:6]] == [
        r[0].ids.tolist() for r in all_.training[:6]
    ]
    with pytest.raises(DataError, match="24 of them held out: none to train on"):
        load_data(settings(texts(tmp_path), holdout=24), Letters(), {}, 3)


def test_records_come_with_their_fields_and_the_recovery_split(tmp_path, monkeypatch):
    import datasets

    asked = []
    builder = SimpleNamespace(as_streaming_dataset=lambda split: asked.append(split) or RECORDS)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **kw: builder)
    known = {
        "a": {"hub": "x/a", "splits": {"calibration": "train", "eval": "test"}, "field": "text"}
    }
    assert list(open_records("a", "recovery", known)) == RECORDS
    assert load_corpus("a", "eval", known)[1] == "Say hi.\nhi"
    known["a"]["splits"]["recovery"] = "tune"
    list(open_records("a", "recovery", known))
    assert asked == ["train", "test", "tune"]
    (tmp_path / "a.txt").write_text("hello")
    assert list(open_records(str(tmp_path / "a.txt"), "recovery", {})) == [{"text": "hello"}]


def test_packed_rows_hold_whole_examples_in_order():
    examples = [Example(ids=torch.full((n,), n), first=1) for n in (3, 2, 4, 1, 5)]
    rows = pack(examples, 5)
    assert [[len(e.ids) for e in row] for row in rows] == [[3, 2], [4, 1], [5]]
    batch = collate(rows[:2], 9, packed=True)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 3, 3, -100, 2], [-100, 4, 4, 4, -100]]
    padded = collate([(examples[0],), (examples[2],)], 9, packed=False)
    assert padded["input_ids"].tolist() == [[3, 3, 3, 9], [4, 4, 4, 4]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert collate([(examples[0],), (examples[2],)], 9, packed=True)["position_ids"].tolist()[
        0
    ] == [0, 1, 2, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_trains_as_if_every_example_had_its_row(tmp_path, attention):
    path, start = texts(tmp_path), small(attention=attention)
    options = {"epochs": 1, "batch_size": 20, "micro_batch": 20, "holdout": 4, "length": 60}
    apart, packed = clone(start), clone(start)
    one = run(apart, settings(path, **options), tmp_path / "a")
    two = run(packed, settings(path, pack=True, **options), tmp_path / "b")
    assert one["tokens"] == two["tokens"]
    assert one["curve"][1]["loss"] == pytest.approx(two["curve"][1]["loss"], rel=1e-6)
    for name, tensor in state(apart).items():
        torch.testing.assert_close(tensor, state(packed)[name], rtol=1e-3, atol=2e-5, msg=name)
    assert not torch.equal(logits(apart), logits(start))


def test_a_model_that_mixes_packed_examples_is_refused(tmp_path):
    model = pruned(tiny_gpt2())
    blind = model.forward
    model.forward = lambda position_ids=None, **kwargs: blind(**kwargs)
    with pytest.raises(
        ConfigError, match="recovery.pack: this model lets examples in a row see each other"
    ):
        run(model, settings(texts(tmp_path), pack=True, length=60), tmp_path)
