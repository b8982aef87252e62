"""A tokenizer with fewer tokens encodes what it can as before, in memory and from its folder."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prunekit.data.vocabulary import count_tokens, reduce_vocabulary
from prunekit.demo import DEMO_MODEL
from prunekit.errors import DataError

WORDS = ["the little numbers came after lower ones", "newest and widest towers", "tower of the low"]
TEXTS = [f"{word}, {number} times {other}." for number, word in enumerate(WORDS) for other in WORDS]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def wrap(backend):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def byte_level(ignore_merges=False):
    """Byte-level BPE whose special tokens have the last ids, and whose texts begin with one."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens(SPECIAL)
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    backend.enable_padding(pad_id=backend.token_to_id("<pad>"), pad_token="<pad>")
    return wrap(backend)


def unigram(byte_fallback=False):
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    stored = json.loads(backend.to_str())
    if byte_fallback:
        stored["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        stored["model"]["byte_fallback"] = True
    return wrap(Tokenizer.from_str(json.dumps(stored)))


def reduce_to(tokenizer, texts, multiple=1):
    rows = max(tokenizer.get_vocab().values()) + 1
    counts = count_tokens(texts, tokenizer, rows)
    return reduce_vocabulary(tokenizer, counts.nonzero().flatten().tolist(), multiple=multiple)


@pytest.fixture(params=["byte_level", "ignore_merges", "unigram", "unigram_bytes"])
def tokenizer(request):
    return {
        "byte_level": byte_level,
        "ignore_merges": lambda: byte_level(ignore_merges=True),
        "unigram": unigram,
        "unigram_bytes": lambda: unigram(byte_fallback=True),
    }[request.param]()


def test_texts_of_kept_tokens_are_encoded_as_before(tokenizer, tmp_path):
    reduced = reduce_to(tokenizer, TEXTS[:2])
    assert len(reduced.kept) < len(tokenizer)
    assert len(reduced.tokenizer) == len(reduced.kept)
    reduced.tokenizer.save_pretrained(tmp_path)
    kept = set(reduced.kept.tolist())
    same = 0
    for own in (reduced.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in TEXTS:
            before, after = tokenizer(text)["input_ids"], own(text)["input_ids"]
            if set(before) <= kept:
                assert reduced.kept[after].tolist() == before
                same += 1
            else:
                assert reduced.kept[after].tolist() != before
    assert 4 <= same < 2 * len(TEXTS)


def test_every_text_can_still_be_read_where_bytes_are_tokens(tokenizer):
    reduced = reduce_to(tokenizer, TEXTS[:1])
    text = "unseen words: żółw"
    readable = tokenizer.decode(tokenizer(text)["input_ids"]) == f"<bos>{text}"
    ids = reduced.tokenizer(text)["input_ids"]
    assert (reduced.tokenizer.decode(ids) == f"<bos>{text}") == readable


def test_special_tokens_stay_and_have_their_new_ids(tokenizer):
    reduced = reduce_to(tokenizer, TEXTS[:1])
    for token in SPECIAL:
        before = tokenizer.convert_tokens_to_ids(token)
        after = reduced.tokenizer.convert_tokens_to_ids(token)
        assert reduced.kept[after] == before
    assert reduced.kept[reduced.tokenizer.pad_token_id] == tokenizer.pad_token_id


def test_padding_and_the_template_follow():
    tokenizer = byte_level()
    reduced = reduce_to(tokenizer, TEXTS[:1])
    before = tokenizer(TEXTS[0])["input_ids"]
    after = reduced.tokenizer([TEXTS[0], "the"], padding=True)["input_ids"]
    assert reduced.kept[after[0]].tolist() == before
    assert after[1][-1] == reduced.tokenizer.pad_token_id
    assert after[1][0] == reduced.tokenizer.bos_token_id


def test_merges_on_the_way_to_a_token_stay():
    """Without them no merge would lead to it: the token would never be made again."""
    tokenizer = byte_level()
    longest = max(tokenizer.get_vocab(), key=lambda token: (token.isascii(), len(token)))
    index = tokenizer.convert_tokens_to_ids(longest)
    reduced = reduce_vocabulary(tokenizer, [index])
    text = longest.replace("Ġ", " ")
    assert reduced.kept[reduced.tokenizer(text)["input_ids"][1:]].tolist() == [index]


def test_unused_tokens_fill_up_a_multiple_and_are_reachable():
    tokenizer = byte_level()
    plain, filled = reduce_to(tokenizer, TEXTS[:1]), reduce_to(tokenizer, TEXTS[:1], multiple=7)
    assert len(plain.kept) % 7
    assert len(filled.kept) % 7 == 0
    added = set(filled.kept.tolist()) - set(plain.kept.tolist())
    for token in tokenizer.convert_ids_to_tokens(sorted(added)):
        ids = filled.tokenizer(token.replace("Ġ", " "))["input_ids"][1:]
        assert filled.tokenizer.convert_ids_to_tokens(ids) == [token]


def test_an_id_without_a_token_stays_where_it_is_asked_for():
    tokenizer = byte_level()
    row = len(tokenizer) + 5
    assert reduce_vocabulary(tokenizer, [], special=[row]).kept[-1] == row


def test_other_tokenizers_are_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(DataError, match="or a unigram one, got WordLevel"):
        reduce_vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), [1])
    with pytest.raises(DataError, match="expected a fast tokenizer"):
        reduce_vocabulary(object(), [1])


@pytest.mark.parametrize("model", ["embedded", "stories260K"])
def test_real_tokenizers(model, data, tmp_path):
    """Byte-level BPE, and SentencePiece's BPE with bytes for what it has no token for."""
    folder = DEMO_MODEL if model == "embedded" else data / "models" / model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time there was a little girl. Her name was Lily."
    reduced = reduce_to(tokenizer, [text])
    reduced.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(
        reduced.kept[again(text)["input_ids"]], torch.tensor(tokenizer(text).input_ids)
    )
    assert again.decode(again("Ein Käse für Lily").input_ids).endswith("Ein Käse für Lily")
    assert len(again) < 0.95 * len(tokenizer)
