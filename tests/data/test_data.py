import json

import pytest
import torch

from prunekit.checkpoint import load_tokenizer
from prunekit.config import check, compose
from prunekit.data import corpora, embedded, encoding
from prunekit.data.batches import count_positions
from prunekit.data.corpora import load_corpus, open_corpus, read_file
from prunekit.data.encoding import encode
from prunekit.data.tokens import evaluation_windows
from prunekit.data.vocabulary import count_tokens
from prunekit.data.windows import Windows
from prunekit.demo import DEMO_MODEL
from prunekit.errors import DataError
from prunekit.jobs.calibration import warnings_of


class Characters:
    """A tokenizer of code points that starts every text with a special 0."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}


def test_splits_are_disjoint_and_depend_on_names_alone():
    train, heldout = (
        {name for name, _ in embedded.documents(split)} for split in ("train", "heldout")
    )
    assert not train & heldout
    assert len(train) > 300
    assert len(heldout) > 10
    assert all(embedded.split_of(name) == "heldout" for name in heldout)
    assert embedded.split_of("ast.py") == embedded.split_of("ast.py")


def test_evaluation_windows_are_consecutive_and_drop_the_tail():
    windows = evaluation_windows(["abc", "defg"], Characters(), 4, None, "x")
    assert windows.tolist() == [[0, 97, 98, 99], [10, 10, 100, 101]]
    assert len(evaluation_windows(["abcdefghijkl" * 50], Characters(), 4, 12, "x")) == 3
    with pytest.raises(DataError, match=r"it has 4 tokens, one window needs 128 \(eval.window\)"):
        evaluation_windows(["abc"], Characters(), 128, None, "x")


def test_local_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["one\ntwo", "three é"]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n")
    (tmp_path / "a.json").write_text(
        json.dumps([{"instruction": "do", "input": "", "output": "done"}])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.txt") == texts[:1]
    assert read_file(tmp_path / "a.jsonl") == read_file(tmp_path / "a.parquet") == texts
    assert read_file(tmp_path / "a.json") == ["do\ndone"]
    assert load_corpus(str(tmp_path / "a.jsonl"), "eval", {}) == texts


def test_a_file_beyond_the_limit_is_read_row_by_row(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(corpora, "WHOLE", 600)
    monkeypatch.setattr(corpora, "_DOCUMENT", 500)
    monkeypatch.setattr(corpora, "_PART", 40)
    texts = [f"line {n} of a long text\n" for n in range(60)]
    rows = [{"text": text} for text in texts]
    (tmp_path / "a.txt").write_text("".join(texts))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts * 9}), tmp_path / "a.parquet")
    for name, documents in (("a.txt", 30), ("a.jsonl", 60), ("a.parquet", 540)):
        path = str(tmp_path / name)
        read = [open_corpus(path, "calibration", {}, seed=seed) for seed in (None, 0)]
        assert not any(isinstance(each, list) for each in read)
        ordered, shuffled = map(list, read)
        assert "".join(ordered) == "".join(texts) * (documents // 30 // 2 or 1)
        assert sorted(shuffled) == sorted(ordered) and shuffled != ordered
        assert len(ordered) == documents
    with pytest.raises(DataError, match=r"expected at most 0 MB, got 0 MB; JSON lines \(\.jsonl\)"):
        load_corpus(str(tmp_path / "a.json"), "calibration", {})


def test_a_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch):
    tokenizer = load_tokenizer(DEMO_MODEL, False)
    sources = [text for name, text in embedded.documents("heldout") if name < "c"]
    for text in ("\n\n".join(sources), " ".join(sources[0].split()), "x" * 9000):
        whole = encode(tokenizer, text, special=False)
        with monkeypatch.context() as patched:
            patched.setattr(encoding, "_PIECE", 3000)
            assert len(list(encoding.encode_pieces(tokenizer, text))) > 2
            if "x" not in text[:2]:  # cut in the midst of a word
                assert torch.equal(encode(tokenizer, text, special=False), whole)
                part = encode(tokenizer, text, special=False, limit=1500)
                assert torch.equal(part, whole[:1500])
            counts = count_tokens(["a b", text], tokenizer, 2048)
            special = encode(Characters(), text, special=True)
        assert special.tolist() == [0, *map(ord, text)]
        assert torch.equal(counts, count_tokens(["a b", text], tokenizer, 2048))


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", "x"), ("a.jsonl", '{"text": "x"}'), ("a.json", '[{"text": "x"}]')]
)
def test_a_mark_of_the_byte_order_is_no_text(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert load_corpus(str(tmp_path / name), "calibration", {}) == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", " \n ", "it holds no text"),
        ("a.jsonl", '{"text": "x"}\n{"te', "can't be read"),
        (
            "a.jsonl",
            '{"text": null}',
            "expected a text field 'text', found text, its type NoneType",
        ),
        ("a.jsonl", '{"content": "x"}', "expected a text field 'text', found content"),
        ("a.json", "3", "expected a list of records"),
        ("a.parquet", "nope", "can't be read"),
        ("a.bin", "x", "expected a file ending in"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=match):
        load_corpus(str(tmp_path / name), "calibration", {})


def test_unknown_corpora_suggest_and_missing_files_say_so():
    with pytest.raises(DataError, match="did you mean wikitext2"):
        load_corpus("wikitext", "eval", {"wikitext2": {}, "c4": {}})
    with pytest.raises(DataError, match="no such file: missing.jsonl"):
        load_corpus("missing.jsonl", "eval", {})


def test_an_unreachable_hub_is_one_line():
    source = {"hub": "nobody/nothing-here", "splits": {"eval": "test"}}
    with pytest.raises(DataError, match="can't load nobody/nothing-here from the hub") as caught:
        load_corpus("nothing", "eval", {"nothing": source})
    assert "\n" not in str(caught.value)


def test_rows_and_tokens_are_not_read_off_a_mask_of_four_dims():
    ids = torch.zeros(3, 7, dtype=torch.long)
    square = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    assert count_positions({"input_ids": ids, "attention_mask": square}) == (3, 7)
    assert count_positions({"attention_mask": torch.ones(1, 7), "input_ids": ids}) == (3, 7)
    assert count_positions({"attention_mask": torch.ones(2, 5)}) == (2, 5)
    assert count_positions({"pixel_values": torch.zeros(4, 3, 8, 8)}) == (4, 1)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (5, r"corpora\.x: expected a mapping with hub and splits, got 5"),
        ({"hub": "a/b"}, r"corpora\.x\.splits: expected a mapping, got None"),
    ],
)
def test_an_entry_of_corpora_that_is_none_is_refused(source, match):
    with pytest.raises(DataError, match=match):
        load_corpus("x", "calibration", {"x": source})


@pytest.mark.parametrize(
    ("calibration", "evaluation", "shared"),
    [
        ("own.txt", "own.txt", True),
        ("own.txt", "{folder}/own.txt", True),
        ("own.txt", "other.txt", False),
        ("embedded", "embedded", False),
        ("alpaca", "alpaca", True),
        ("alpaca", "alpaca_raw", False),
        ("c4", "c4", False),
        ("own.txt", "c4", False),
    ],
)
def test_a_text_that_calibrates_and_is_evaluated_is_named(
    calibration, evaluation, shared, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    where = "corpus" if calibration in ("embedded", "alpaca", "c4") else "path"
    options = [f"data.calibration.{where}={calibration}"]
    options += [f"eval.corpora=[embedded,{evaluation.format(folder=tmp_path)}]"]
    config = check(compose(options))
    windows = Windows(ids=torch.arange(8).view(2, 4), documents=2, available=8)
    expected = (
        f"eval.corpora: {calibration} calibrates too: its perplexity is of text that was seen; "
        "give a text of its own"
    )
    assert warnings_of(config, windows) == [expected] * shared
