import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from prunekit.runtime.precision import computing_in, widen

CPU = torch.device("cpu")


class Halves(nn.Module):
    """Casts to its own type again and again, fills a table, counts its calls."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.register_buffer("table", torch.zeros(2, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        dtype = self.first.weight.dtype
        self.calls.add_(1)
        hidden = self.norm(self.first(x)).to(dtype).softmax(-1, dtype=torch.float32).to(dtype)
        self.table[1] = self.last(hidden)[0]
        total = torch.zeros(len(x), 3, dtype=dtype)
        total.index_add_(0, torch.arange(len(x)), self.last(hidden))
        return total + self.table.sum(0)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_everything_computes_in_the_wide_type(wide):
    torch.manual_seed(0)
    model = Halves().bfloat16().requires_grad_(False)
    x = torch.randn(4, 6).bfloat16()
    kept = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with computing_in(wide, CPU):
        output = model(x)
    wider = Halves().requires_grad_(False)
    wider.load_state_dict(kept, strict=False)
    wider = wider.to(wide)
    expected = wider(x.to(wide))
    assert output.dtype == wide
    # The table is a buffer of bf16: what was written there is the only thing that was rounded.
    row = wider.table[1]
    torch.testing.assert_close(output, expected - row + row.bfloat16().to(wide))
    assert torch.equal(model.table[1], wider.table[1].bfloat16())
    assert model.calls == 1
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def test_wider_numbers_stay_wider():
    with computing_in(torch.float32, CPU):
        assert (torch.ones(2, dtype=torch.float64) * torch.ones(2).half()).dtype == torch.float64
        assert (torch.ones(2, dtype=torch.int64) + 1).dtype == torch.int64


def test_casts_and_mixed_precision_are_off_and_settings_come_back():
    places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
    before = [place.fp32_precision for place in places]
    left, right = torch.randn(5, 6), torch.randn(6, 5)
    expected = left @ right
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (left @ right).dtype == torch.bfloat16
        with computing_in(torch.float32, CPU):
            assert torch.equal((left @ right).bfloat16(), expected)
            assert {place.fp32_precision for place in places} == {"ieee"}
    with pytest.raises(KeyboardInterrupt), computing_in(torch.float32, CPU):
        raise KeyboardInterrupt
    assert [place.fp32_precision for place in places] == before
    assert _get_current_dispatch_mode_stack() == []


def test_trees_are_cast_as_a_whole():
    half = torch.ones(2, dtype=torch.float16)
    tree = widen({"a": [half, 3], "b": (torch.float16, torch.int8)}, torch.float32)
    assert tree["a"][0].dtype == torch.float32
    assert tree["b"] == (torch.float32, torch.int8)
