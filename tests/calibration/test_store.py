"""Copies to host memory and back that run beside the work of a GPU."""

import pytest
import torch

from prunekit.calibration.store import Store


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is missing")
@pytest.mark.parametrize("ahead", [False, True])
def test_copies_beside_the_work_of_a_gpu_bring_back_what_left(ahead):
    """Memory is used again at once, and there is work between the copies: what would race does."""
    store, generator = Store("cuda", budget=0), torch.Generator("cuda").manual_seed(0)
    size = (4, 512, 1024)
    kept, sums = [], []
    for _ in range(24):
        tensor = torch.randn(size, device="cuda", generator=generator)
        sums.append(tensor.double().sum((0, 1)))
        kept.append(store.put(tensor, copy=False))
        del tensor
        torch.randn(size, device="cuda", generator=generator).mul_(2)  # in the memory of another
    for _ in range(3):
        for i, one in enumerate(kept):
            back = one.get()
            if ahead and i + 1 < len(kept):
                kept[i + 1].fetch()
            work = back.flatten(0, 1)
            work = work @ torch.ones(1024, 1024, device="cuda")
            assert work.shape == (2048, 1024)
            sums.append((back.double().sum((0, 1)) - sums[i]).abs().max())
            back.zero_()
    assert torch.stack(sums[24:]).max() < 1e-9
    kept[0].fetch()
    for one in kept:
        one.free()
    store.close()
    assert store.used == {"device": 0, "host": 0, "file": 0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is missing")
def test_a_tensor_may_be_written_to_once_it_was_put_with_a_copy():
    store = Store("cuda", budget=0)
    tensor = torch.ones(64, 1024, 1024, device="cuda")
    kept = store.put(tensor)
    tensor.zero_()
    assert bool((kept.get() == 1).all())
