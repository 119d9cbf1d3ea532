"""`lib.train.memory`: what is counted, what is not, and when memory counts as freed."""

import gc

import torch
import torch.nn.functional as F

from lib.train.memory import PeakTensor


def test_largest_and_peak_of_a_chain():
    with PeakTensor() as memory:
        total = torch.ones(100, 10).mul(2).sum()
    assert (memory.largest_shape, memory.largest_bytes, memory.largest_dtype) == (
        (100, 10),
        4000,
        torch.float32,
    )
    assert memory.peak_bytes == 8000  # the ones and their double; the sum comes when the ones are gone
    assert memory.live_bytes == 4 and total.item() == 2000
    assert memory.made_bytes == 8004


def test_inputs_and_views_do_not_count():
    given = torch.randn(50, 20)
    with PeakTensor() as memory:
        given.T[3:5].unsqueeze(0)
        given.view(-1).add_(1)
    assert memory.peak_bytes == 0 and memory.largest_shape == ()


def test_storage_counts_once_and_until_it_is_freed():
    with PeakTensor() as memory:
        for _ in range(5):
            chunk = torch.empty(1000)
            view = chunk.view(10, 100)
            view.add_(1)
            del chunk, view
    gc.collect()
    assert memory.peak_bytes == 4000 and memory.live_bytes == 0 and memory.made_bytes == 20000


def test_a_view_keeps_its_storage_alive():
    with PeakTensor() as memory:
        view = torch.empty(1000)[:1]
        assert memory.live_bytes == 4000
        del view
        assert memory.live_bytes == 0


def test_memory_freed_after_the_context_is_noticed():
    with PeakTensor() as memory:
        kept = torch.empty(8)
    assert memory.live_bytes == 32
    del kept
    assert memory.live_bytes == 0


def test_resized_output_counts_its_new_size():
    with PeakTensor() as memory:
        target = torch.empty(1)
        target.resize_(100)
    assert memory.peak_bytes == 400


def test_backward_is_seen():
    hidden = torch.randn(16, 4, requires_grad=True)
    weight = torch.randn(300, 4, requires_grad=True)
    targets = torch.randint(300, (16,))
    with PeakTensor(ignore=(weight.shape, weight.T.shape, hidden.shape)) as memory:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert memory.largest_shape == (16, 300)
    assert memory.peak_bytes >= 2 * 16 * 300 * 4  # logits or their softmax, and the gradient
    assert weight.grad is not None


def test_ignored_shapes():
    with PeakTensor(ignore=[(7, 7)]) as memory:
        torch.empty(7, 7)
        torch.empty(3)
    assert memory.largest_shape == (3,) and memory.made_bytes == 12


def test_shapes_that_fit_nowhere():
    hidden = torch.empty(8192, 2304, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(256000, 2304, device="meta", dtype=torch.bfloat16)
    with PeakTensor() as memory:
        hidden @ weight.T
    assert memory.largest_bytes == 8192 * 256000 * 2


def test_sparse_tensors_pass_through():
    with PeakTensor() as memory:
        matrix = torch.eye(4).to_sparse()
        dense = matrix @ torch.ones(4, 2)
    assert dense.sum() == 8 and memory.peak_bytes > 0


def test_nested_contexts_count_separately():
    with PeakTensor() as outer:
        torch.empty(10)
        with PeakTensor() as inner:
            torch.empty(20)
    assert inner.peak_bytes == 80 and outer.largest_bytes == 80 and outer.made_bytes == 120
