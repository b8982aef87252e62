import math

import pytest
import torch
from conftest import tiny_llama
from recovery_helpers import clone, logits, pruned, run, settings, small, texts

from prunekit.errors import ConfigError
from prunekit.recovery.distill import hidden_loss, kl_loss, plain_loss


def test_kl_is_what_it_is_called():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = 0.0
    for t in range(5):
        p, q = ([math.exp(x / 3) for x in row[t].tolist()] for row in (ours, theirs))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += 9 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert kl_loss(ours, theirs, 3.0).item() == pytest.approx(expected, rel=1e-5)
    assert kl_loss(ours, ours, 3.0).item() == pytest.approx(0, abs=1e-6)
    labels = torch.tensor([0, 1, 2, 3, 4])
    by_hand = -sum(ours[t].log_softmax(-1)[t].item() for t in range(5))
    assert plain_loss(ours, labels).item() == pytest.approx(by_hand, rel=1e-5)


def test_hidden_states_are_paired_by_relative_depth():
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(2, 3, 4, generator=generator) for _ in range(5)]
    chosen = torch.tensor([[True, True, False], [False, True, True]])
    assert hidden_loss([teacher[0], teacher[2], teacher[4]], teacher, chosen).item() == 0
    student = [torch.zeros(2, 3, 4)] * 5
    assert hidden_loss(student, teacher, chosen).item() == pytest.approx(4)  # one a token
    half = [t / 2 for t in teacher]
    assert hidden_loss(half, teacher, chosen).item() == pytest.approx(1)
    with pytest.raises(ConfigError, match="as wide as the teacher's 4, got 3"):
        hidden_loss([t[..., :3] for t in teacher], teacher, chosen)


@pytest.mark.parametrize(
    "options", [{"lora": True}, {"lora": False}, {"lora": False, "hidden": 0.5}]
)
def test_a_pruned_model_comes_nearer_to_its_teacher(tmp_path, options):
    teacher = tiny_llama(layers=2)
    model = pruned(clone(teacher))
    weights = clone(teacher).state_dict()

    def distance(m):
        ids = torch.tensor([[0, 7, 8, 7, 8, 7, 8, 7, 9, 10, 9, 1]])
        return kl_loss(logits(m, ids)[0], logits(teacher, ids)[0], 1.0).item()

    before = distance(model)
    recovery = settings(texts(tmp_path), epochs=4, plain=0.0, kl=1.0, temperature=2.0, **options)
    report = run(model, recovery, tmp_path, teacher=teacher)
    losses = [point["loss"] for point in report["curve"] if "loss" in point]
    assert losses[-1] < 0.7 * losses[0]
    assert distance(model) < before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())


def test_a_teacher_is_its_own_best_pupil(tmp_path):
    teacher = small().train()
    teacher.model.norm.eval()
    modes = [module.training for module in teacher.modules()]
    model = clone(teacher)
    recovery = settings(texts(tmp_path), plain=0.0, kl=1.0, hidden=1.0, epochs=1)
    report = run(model, recovery, tmp_path, teacher=teacher)
    assert report["curve"][1]["loss"] == pytest.approx(0, abs=1e-6)
    assert [module.training for module in teacher.modules()] == modes


def test_another_vocabulary_is_refused(tmp_path):
    teacher = small()
    teacher.resize_token_embeddings(99)
    with pytest.raises(ConfigError, match="the model's vocabulary of 97, got 99"):
        run(small(), settings(texts(tmp_path), kl=1.0), tmp_path, teacher=teacher)
