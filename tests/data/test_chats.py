"""Chats and instructions: known by their fields, rendered by the tokenizer's template."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prunekit.config.sections import CalibrationConfig
from prunekit.data.chats import turns_of
from prunekit.data.corpora import load_corpus
from prunekit.data.windows import Windows, mix_windows
from prunekit.errors import ConfigError, DataError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
)
RECORDS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
    {"prompt": "Hi", "completion": "Yes"},
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Yes"}],
    },
    {"instruction": "Hi", "input": "", "output": "Yes"},
]


@pytest.fixture(scope="module")
def chatting():
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "-".join(record))
def test_a_chat_is_rendered_by_the_template(record, chatting, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps(record))
    path = str(tmp_path / "chats.jsonl")
    assert load_corpus(path, "calibration", {}, chatting) == ["<user>Hi</s><assistant>Yes</s>"]
    assert load_corpus(path, "calibration", {}) == ["Hi\nYes"]


def test_an_instruction_with_an_input_and_a_system_turn():
    turns = turns_of({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert [turn["content"] for turn in turns] == ["Add.\n1 2", "3"]
    turns = turns_of({"conversations": [{"from": "system", "value": "Be kind."}]})
    assert turns == [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": None, "completion": 3}, ["", "3"]),
        ({"instruction": 1, "input": 2, "output": None}, ["1\n2", ""]),
        ({"prompt": "Hi", "completion": {"role": "assistant", "content": "Yes"}}, ["Hi", "Yes"]),
        ({"messages": [{"role": "user", "content": ["a", {"text": "b"}]}]}, ["ab"]),
        ({"messages": [{"role": "user", "content": {"text": "a"}}]}, ["a"]),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, [""]),
        (
            {"messages": [{"from": "human", "value": "a"}, {"role": "x", "content": "b"}]},
            ["a", "b"],
        ),
        ({"messages": "Hi"}, None),
        ({"messages": ["Hi"]}, None),
        ({"conversations": "Hi"}, None),
        ({"prompt": [None], "completion": []}, None),
    ],
)
def test_records_of_odd_shapes_are_chats_or_none(record, expected):
    turns = turns_of(record)
    assert (turns and [turn["content"] for turn in turns]) == expected


def test_what_is_no_chat_names_its_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"speaker": "x"}]}))
    with pytest.raises(DataError, match="expected a text field 'text', found messages"):
        load_corpus(str(tmp_path / "a.jsonl"), "calibration", {})


def test_a_template_that_refuses_is_one_line(chatting, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "tool", "content": "x"}]}))
    with pytest.raises(DataError, match="refuses a chat of tool: no tools"):
        load_corpus(str(tmp_path / "a.jsonl"), "calibration", {}, chatting)


def test_a_mix_has_its_shares_of_samples():
    mix = CalibrationConfig(mix={"c4": 0.5, "alpaca": 0.3, "mine.txt": 0.2}, samples=11)
    assert mix.samples_by_corpus() == {"c4": 6, "alpaca": 3, "mine.txt": 2}
    assert CalibrationConfig(path="a.txt", samples=3).samples_by_corpus() == {"a.txt": 3}
    for wrong, told in (
        ({"mix": {"c4": 0.0}}, "c4: expected > 0, got 0"),
        ({"mix": {"c4": 1.0}, "path": "a.txt"}, "expected path or mix"),
        ({"mix": {"c4": 99.0, "ptb": 1.0}, "samples": 9}, "no sample of 9 is left for ptb"),
    ):
        with pytest.raises(ConfigError, match=told):
            CalibrationConfig(**wrong)


def test_mixed_windows_are_all_there_in_another_order():
    parts = [Windows(ids=torch.full((n, 4), n), documents=n, available=40 * n) for n in (3, 5)]
    mixed = mix_windows(parts, seed=0)
    assert sorted(mixed.ids[:, 0].tolist()) == [3] * 3 + [5] * 5
    assert mixed.ids[:, 0].tolist() != [3] * 3 + [5] * 5
    assert (mixed.documents, mixed.available) == (8, 320)
