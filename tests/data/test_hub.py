"""Corpora of the hub, through `datasets.load_dataset` itself, from folders laid out like it."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from processes import run_python

from prunekit import config as cfg
from prunekit.data import corpora
from prunekit.data.corpora import load_corpus, open_corpus, open_records
from prunekit.data.windows import draw_windows
from prunekit.errors import DataError
from prunekit.recovery.data import load_data
from prunekit.recovery.settings import Recovery

NAMES = ("c4", "wikitext2", "ptb", "bookcorpus", "alpaca", "alpaca_raw")
SENTENCES = [f"sentence {n} of a corpus , with words" for n in range(300)]


class Characters:
    """A tokenizer of code points."""

    chat_template = None
    pad_token_id = eos_token_id = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(c) for c in text]}


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=20)


def write_c4(folder):
    """Compressed JSON lines, the files of one shard."""
    for name in ("train.00000-of-01024", "validation.00000-of-00008"):
        path = folder / "en" / f"c4-{name}.json.gz"
        path.parent.mkdir(exist_ok=True, parents=True)
        rows = ({"text": t, "timestamp": "2019", "url": name} for t in SENTENCES)
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def write_wikitext(folder):
    """Parquet beside a card that names the configurations."""
    for split in ("train", "validation", "test"):
        rows = [{"text": text} for text in ["", *SENTENCES]]
        write_parquet(folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet", rows)
    files = [
        {"split": split, "path": f"wikitext-2-raw-v1/{split}-*"}
        for split in ("train", "validation", "test")
    ]
    card = {"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


def write_ptb(folder):
    """What the hub converted to parquet: a folder for each configuration and split."""
    for split in ("train", "validation", "test"):
        rows = [{"sentence": text} for text in SENTENCES]
        write_parquet(folder / "penn_treebank" / split / "0000.parquet", rows)


def write_bookcorpus(folder):
    for part in range(2):
        rows = [{"text": text} for text in SENTENCES]
        write_parquet(folder / "plain_text" / "train" / f"000{part}.parquet", rows)


def write_alpaca(folder):
    folder.mkdir()
    rows = [{"instruction": text, "input": "", "output": "yes"} for text in SENTENCES]
    (folder / "alpaca_data_cleaned.json").write_text(json.dumps(rows))


def write_alpaca_raw(folder):
    rows = [
        {"instruction": text, "input": "here", "output": "yes", "text": f"Below: {text}"}
        for text in SENTENCES
    ]
    write_parquet(folder / "data" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet", rows)


WRITERS = {
    "c4": write_c4,
    "wikitext2": write_wikitext,
    "ptb": write_ptb,
    "bookcorpus": write_bookcorpus,
    "alpaca": write_alpaca,
    "alpaca_raw": write_alpaca_raw,
}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The named corpora as they are configured, each with a local folder for its repository."""
    stored = yaml.safe_load((cfg.config_dir() / "corpora.yaml").read_text())["corpora"]
    folder = tmp_path_factory.mktemp("hub")
    for name, write in WRITERS.items():
        write(folder / name)
        stored[name]["hub"] = str(folder / name)
    return stored


def test_every_named_corpus_has_a_stand_in(known):
    assert known.keys() == WRITERS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_named_corpus_is_read_as_it_is_configured(name, known):
    for purpose in ("calibration", "eval"):
        documents = load_corpus(name, purpose, known)
        assert len(documents) >= len(SENTENCES)
        assert all("sentence" in text for text in documents)


def test_no_more_is_read_than_the_windows_need(known, monkeypatch):
    monkeypatch.setattr(corpora, "_BUFFER", 16)
    read = []

    def counted(documents):
        for text in documents:
            read.append(text)
            yield text

    for seed in (0, 0, 1):
        documents = open_corpus("bookcorpus", "calibration", known, seed=seed)
        draw_windows(counted(documents), Characters(), samples=5, length=64, seed=0)
        read.append(None)
    first, second, third = " ".join(text or "|" for text in read).split("|")[:3]
    assert first.strip() == second.strip() != third.strip(), "the order is the seed's"
    assert first.count("sentence") < 20 < 2 * len(SENTENCES)
    assert first.split()[1] != "0" or third.split()[1] != "0"


def test_rows_as_long_as_books_are_shuffled_in_less_memory(monkeypatch):
    monkeypatch.setattr(corpora, "_BUFFERED", 5_000)
    rows = [{"text": "x" * 1000, "n": n} for n in range(40)]
    read = []
    drawn = corpora._shuffle((read.append(row) or row for row in rows), seed=0)
    for taken, row in enumerate(drawn):
        assert len(read) - taken <= 5 or len(read) == len(rows)
        rows[row["n"]] = None
    assert rows == [None] * 40


def test_a_recovery_reads_no_more_than_its_samples_need(known, monkeypatch):
    monkeypatch.setattr("prunekit.recovery.data._LEAST", 1_000)
    opened = corpora._stream_from_hub
    read = []

    def counted(*args):
        for row in opened(*args):
            read.append(row)
            yield row

    monkeypatch.setattr(corpora, "_stream_from_hub", counted)
    said = []
    monkeypatch.setattr("prunekit.recovery.data.say", said.append)
    for samples in (4, None):
        settings = Recovery(corpus="bookcorpus", samples=samples, length=8, holdout=2, batch_size=2)
        data = load_data(settings, Characters(), known, seed=0)
        assert len(data.validation) == 2
        assert data.examples == 4 if samples else 80 < data.examples < 140
        assert 1_000 / 60 < len(read) < 60 < 2 * len(SENTENCES)
        assert "records were read; recovery.samples=N reads" in said[-1]
        read.clear()


def test_evaluation_stops_at_its_characters(known):
    assert len(load_corpus("c4", "eval", known, characters=100)) < 5
    assert load_corpus("c4", "eval", known, characters=100)[0] == SENTENCES[0]


def test_records_of_the_hub_keep_their_fields(known):
    assert list(open_records("alpaca", "recovery", known))[0]["output"] == "yes"


def test_a_missing_field_is_named(known):
    wrong = {"ptb": known["ptb"] | {"field": "text"}}
    with pytest.raises(DataError, match="expected a text field 'text', found sentence"):
        load_corpus("ptb", "eval", wrong)


READ = """
import json, sys, time
from pathlib import Path

def resident(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if key in l)
    return int(line.split()[1]) * 1024

start = resident("VmRSS")
from prunekit.data.corpora import load_corpus, open_corpus
from prunekit.data.windows import draw_windows

name, known = sys.argv[1], json.loads(Path("known.json").read_text())
class Characters:
    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

documents = open_corpus(name, "calibration", known, seed=0)
drawn = draw_windows(documents, Characters(), samples=64, length=2048, seed=0)
evaluated = load_corpus(name, "eval", known, characters=100_000)
print(len(drawn.ids), len(evaluated), resident("VmHWM") - start)
"""


def write_large_c4(folder):
    """A shard of 1.6 GB of text, as the hub compresses it."""
    rows = [{"text": f"{n} {text} " * 100} for n, text in enumerate(SENTENCES * 20)]
    part = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    for name in ("train.00000-of-01024", "validation.00000-of-00008"):
        path = folder / "en" / f"c4-{name}.json.gz"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(gzip.compress(part, 1) * (1_600_000_000 // len(part)))


def write_large_bookcorpus(folder):
    """Two files of 1.7 GB of text in all, in groups of 100,000 rows."""
    path = folder / "plain_text" / "train" / "0000.parquet"
    path.parent.mkdir(parents=True)
    rows = pyarrow.table({"text": [f"{text} " * 20 for text in SENTENCES] * 333})
    for number in range(2):
        file = path.with_name(f"000{number}.parquet")
        with pyarrow.parquet.ParquetWriter(file, rows.schema) as writer:
            for _ in range(12):
                writer.write_table(rows, row_group_size=100_000)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
@pytest.mark.parametrize("name", ["c4", "bookcorpus"])
def test_a_corpus_larger_than_a_gigabyte_takes_less_than_one(name, known, tmp_path):
    write = {"c4": write_large_c4, "bookcorpus": write_large_bookcorpus}[name]
    write(tmp_path / name)
    (tmp_path / "known.json").write_text(
        json.dumps({name: known[name] | {"hub": str(tmp_path / name)}})
    )
    done = run_python(READ, name, cwd=tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    samples, documents, grown = map(int, done.stdout.split())
    assert (samples, documents > 1) == (64, True)
    assert grown < 1e9
