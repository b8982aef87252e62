"""A pruned model in memory, never reloaded, is saved, copied and pickled like any other."""

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import randomise, tiny_llama, token_ids
from transformers import (
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    YolosConfig,
    YolosForObjectDetection,
)

import prunekit

IDS = token_ids(8, 12)


@pytest.fixture(scope="module", params=[1, 0], ids=["widths", "nothing left"])
def pruned(request):
    model = tiny_llama(layers=4)
    shares = ["policy=manual", "policy.values=[1,0.1,0.1,0.1]", f"scope.min_units={request.param}"]
    prunekit.prune(model, ratio=0.3, calibration=IDS, overrides=[*shares, "shapes=free"])
    kept = {layer.mlp.up_proj.out_features for layer in model.model.layers}
    assert len(kept) > 1  # the model's class can't build it
    assert min(kept) == request.param
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def through_torch(model, folder):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_transformers(model, folder):
    model.save_pretrained(folder / "model")
    return prunekit.from_pretrained(folder / "model")


def through_trainer(model, folder):
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    args = TrainingArguments(output_dir=str(folder), save_steps=1, learning_rate=0.0, **settings)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=copy.deepcopy(model), args=args, train_dataset=rows).train()
    return prunekit.from_pretrained(folder / "checkpoint-1")


class Hub:
    """Takes what is uploaded into a folder."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **_):
        for file in operations:
            (self.folder / file.path_in_repo).write_bytes(Path(file.path_or_fileobj).read_bytes())


def through_the_hub(model, folder):
    with patch("transformers.utils.hub.hf_api", lambda **_: Hub(folder)):
        model.push_to_hub("me/small")
    return prunekit.from_pretrained(folder)


@pytest.mark.parametrize(
    "through",
    [
        lambda model, _: copy.deepcopy(model),
        lambda model, _: pickle.loads(pickle.dumps(model)),
        through_torch,
        through_transformers,
        through_trainer,
        through_the_hub,
    ],
    ids=["deepcopy", "pickle", "torch.save", "save_pretrained", "Trainer", "push_to_hub"],
)
def test_the_model_computes_the_same_afterwards(pruned, through, tmp_path):
    again = through(pruned, tmp_path)
    assert torch.equal(logits(again), logits(pruned))
    prunekit.save_pretrained(again, tmp_path / "own")
    assert torch.equal(logits(prunekit.from_pretrained(tmp_path / "own")), logits(pruned))


def test_a_model_that_is_pruned_again_has_the_record_of_its_new_sizes(tmp_path):
    model = tiny_llama(layers=4)
    for _ in range(2):
        prunekit.prune(model, ratio=0.2, calibration=IDS)
        again = through_transformers(model, tmp_path / str(_))
        assert torch.equal(logits(again), logits(model))


IMAGES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES |= {"num_hidden_layers": 3, "image_size": [16, 16], "patch_size": 8}
EXPERTS = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
EXPERTS |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (
            lambda: YolosForObjectDetection(YolosConfig(**IMAGES, num_detection_tokens=4)),
            {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
        ),
        (lambda: MixtralForCausalLM(MixtralConfig(**EXPERTS)), {"input_ids": IDS}),
    ],
    ids=["renamed", "stacked"],
)
def test_weights_keep_the_names_of_the_model(build, inputs, tmp_path):
    """transformers would write them as the class's first checkpoints had them."""
    model = randomise(build())
    shares = ["policy=manual", "policy.values=[0,1,1]"]
    prunekit.prune(model, ratio=0.1, method="magnitude", calibration=[inputs], overrides=shares)
    again = through_transformers(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_cache_makes_no_classes(pruned, tmp_path):
    """transformers copies a config for every layer of every cache: a class each would take longer
    than the forward pass.
    """
    prunekit.save_pretrained(pruned, tmp_path / "model")
    for model in (pruned, prunekit.from_pretrained(tmp_path / "model")):
        assert type(copy.copy(model.config)) is type(model.config)
        before = len(type(model.config).__mro__[1].__subclasses__())
        DynamicCache(config=model.config)
        assert len(type(model.config).__mro__[1].__subclasses__()) == before
