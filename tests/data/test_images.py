"""Calibration on records with images, through a processor that is built here."""

import io
import json
from functools import cache

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import command_line, randomise
from PIL import Image

import prunekit
from prunekit.checkpoint import load_tokenizer
from prunekit.data.images import draw_image_samples, read_image_records
from prunekit.demo import DEMO_MODEL
from prunekit.errors import DataError

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40}
SIZES |= {"num_hidden_layers": 2}
WORDS = ["a red square", "green, and then some more", "blue"]
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{{ '\\n' }}{% endfor %}"
)
SMALL = ["eval.corpora=[]", "eval.prompts=[]", "eval.speed=false", "eval.macs=0", "ratio=0.03"]
SMALL += ["data.calibration.samples=3", "data.calibration.batch_size=2", "shapes=free"]
SMALL += ["eval.window=32"]


@cache
def processor(template=None):
    tokenizer = load_tokenizer(DEMO_MODEL, False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(**sizes),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def llava():
    torch.manual_seed(0)
    tokens = processor().tokenizer
    text = {"vocab_size": len(tokens), "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**SIZES, **text),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    )
    return randomise(transformers.LlavaForConditionalGeneration(config), 0.1).eval()


def images():
    return [Image.new("RGB", (20 + 4 * i, 30), colour) for i, colour in enumerate(COLOURS)]


def by_hand(texts):
    tokens = processor().tokenizer
    tokens.pad_token = tokens.eos_token
    tokens.padding_side = "right"
    each = [[image] for image in images()]
    made = dict(processor()(text=texts, images=each, padding=True, return_tensors="pt"))
    tokens.pad_token = None
    return made


@pytest.fixture
def folder(tmp_path):
    """Images beside a file of records with their paths."""
    (tmp_path / "pictures").mkdir()
    records = []
    for i, image in enumerate(images()):
        image.save(tmp_path / f"pictures/{i}.png")
        records.append({"image": f"pictures/{i}.png", "text": WORDS[i]})
    (tmp_path / "records.json").write_text(json.dumps(records))
    return tmp_path


def encoded(image):
    file = io.BytesIO()
    image.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def draw(path, template=None, samples=3, length=64):
    marks = {processor().tokenizer.convert_tokens_to_ids("<image>")}
    return draw_image_samples(
        str(path),
        read_image_records(str(path)),
        processor(template),
        marks,
        samples=samples,
        length=length,
        rows=3,
        seed=0,
    )


def test_all_forms_of_records_are_read_alike(folder):
    pairs = list(zip(WORDS, images(), strict=True))
    asked = [{"from": "human", "value": "<image>\nWhat?"}]
    told = [[*asked, {"from": "gpt", "value": word}] for word in WORDS]
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "\nWhat?"}]
    answers = [{"role": "assistant", "content": [{"type": "text", "text": w}]} for w in WORDS]
    forms = {
        "paths.json": [
            {"image": f"pictures/{i}.png", "conversations": chat} for i, chat in enumerate(told)
        ],
        "bytes.parquet": [
            {"images": [encoded(image)], "messages": [{"role": "user", "content": parts}, answer]}
            for (_, image), answer in zip(pairs, answers, strict=True)
        ],
        "strings.json": [
            {
                "image": f"pictures/{i}.png",
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, "\nWhat?"]},
                    {"role": "assistant", "content": [word]},
                ],
            }
            for i, word in enumerate(WORDS)
        ],
    }
    for name in ("paths.json", "strings.json"):
        (folder / name).write_text(json.dumps(forms[name]))
    table = pyarrow.Table.from_pylist(forms["bytes.parquet"])
    pyarrow.parquet.write_table(table, folder / "bytes.parquet")
    expected = by_hand([f"user:<image>\nWhat?\nassistant:{word}\n" for word in WORDS])
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0))
    for name in forms:
        (batch,) = draw(folder / name, TEMPLATE).batches
        assert batch.keys() == expected.keys()
        for key, value in batch.items():
            assert torch.equal(value, expected[key][order]), (name, key)


def test_texts_get_a_mark_and_lose_their_end(folder):
    samples = draw(folder / "records.json", samples=4, length=6)
    expected = by_hand([f"<image>{word}" for word in WORDS])
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.cat([batch["input_ids"] for batch in samples.batches])
    assert torch.equal(ids, expected["input_ids"][[*order, order[0]], :6])
    assert "1 of the 4 samples repeat others" in samples.warning
    with pytest.raises(DataError, match="sequence_length: expected at least 4, .* got 3"):
        draw(folder / "records.json", length=3)


def test_a_run_is_calibrated_on_images_and_keeps_the_processor(folder):
    prunekit.save_pretrained(llava(), folder / "dense", processor())
    arguments = ["model.path=dense", "data.calibration.path=records.json", "policy=uniform"]
    arguments += ["output_dir=out", "data.calibration.sequence_length=32"]
    done = command_line(*SMALL, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    inputs = by_hand([f"<image>{word}" for word in WORDS])
    overrides = ["policy=uniform", "shapes=free"]
    model = prunekit.prune(llava(), ratio=0.03, calibration=[inputs], overrides=overrides).model
    again = prunekit.from_pretrained(folder / "out/model")
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, model(**inputs).logits, atol=1e-4)
    kept = transformers.AutoProcessor.from_pretrained(folder / "out/model")
    assert type(kept) is transformers.LlavaProcessor
    card = (folder / "out/model/README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "processor = AutoProcessor.from_pretrained(folder)" in card
    assert "pipeline_tag: image-text-to-text" in card


def refuse(folder, change):
    records = json.loads((folder / "records.json").read_text())
    change(records)
    (folder / "records.json").write_text(json.dumps(records))
    draw(folder / "records.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[1].update(image="none.png"), "record 2: no such image: .*none.png"),
        (lambda r: r[1].update(image="records.json"), "record 2: can't read an image from"),
        (lambda r: r[1].pop("image"), "record 2: expected image or images"),
        (lambda r: r[1].pop("text"), "record 2: expected text or messages, found image"),
        (
            lambda r: r[1].update(text=None, messages=[{"content": [{"type": "image"}]}]),
            "record 2: expected text or messages",
        ),
        (lambda r: r[1].update(text="<image> <image>"), "the processor refuses them"),
    ],
)
def test_mistakes_name_the_record(folder, change, message):
    with pytest.raises(DataError, match=message):
        refuse(folder, change)


def test_a_model_without_a_processor_takes_no_images(folder):
    done = command_line(*SMALL, "data.calibration.path=records.json", "output_dir=out", cwd=folder)
    assert done.returncode == 2
    assert "its records hold images; expected a model that sees" in done.stderr
    mix = "data.calibration.mix={records.json: 1.0}"
    done = command_line(*SMALL, mix, "output_dir=out", cwd=folder)
    assert "records.json holds images; expected data.calibration.path=" in done.stderr
