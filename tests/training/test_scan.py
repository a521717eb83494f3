"""The training scan equals the plain recursion, forward and backward."""

import pytest
import torch
from torch import Tensor

from deltamem_vllm.training.scan import CHUNK, ScanInputs, ScanOutputs, delta_rule_scan

Sizes = tuple[int, int, int, int]


def plain_scan(inputs: ScanInputs, state: Tensor) -> ScanOutputs:
    reads = []
    for query, key, value, keep, erase, write in zip(*(x.unbind(1) for x in inputs), strict=True):
        reads.append(torch.einsum("bhij,bhj->bhi", state, query))
        predicted = torch.einsum("bhij,bhj->bhi", state, key)
        change = write * value - erase * predicted
        state = keep.unsqueeze(-1) * state + change.unsqueeze(-1) * key.unsqueeze(-2)
    return ScanOutputs(torch.stack(reads, dim=1), state)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 2), (2, 7, 1, 8), (3, 5, 4, 3), (1, CHUNK, 1, 2), (2, 2 * CHUNK + 5, 2, 3)]
)
def test_values_and_gradients_equal_the_plain_recursion(sizes: Sizes) -> None:
    batch, length, heads, rank = sizes
    torch.manual_seed(0)
    names = ScanInputs._fields
    leaves = [
        torch.rand(batch, length, heads, rank, dtype=torch.float64) - (0.0 if i > 2 else 0.5)
        for i in range(len(names))
    ]
    leaves.append(torch.randn(batch, heads, rank, rank, dtype=torch.float64))
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = {}
    for scan in (plain_scan, delta_rule_scan):
        result = scan(ScanInputs(*leaves[:-1]), leaves[-1])
        loss = result.reads.sin().sum() + result.state.cos().sum()
        outputs[scan] = (*result, *torch.autograd.grad(loss, leaves))
    what = (*ScanOutputs._fields, *(f"gradient of {name}" for name in (*names, "state")))
    for name, plain, fast in zip(what, outputs[plain_scan], outputs[delta_rule_scan], strict=True):
        torch.testing.assert_close(fast, plain, msg=name)


def test_a_token_without_write_leaves_the_state() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 2, 8)
    zeros = torch.zeros(2, 4, 2, 8)
    state = torch.randn(2, 2, 8, 8)
    inputs = ScanInputs(query, key, value, torch.ones_like(zeros), erase=zeros, write=zeros)
    assert torch.equal(delta_rule_scan(inputs, state).state, state)


def test_a_long_history_keeps_few_states_for_the_backward_pass() -> None:
    """What autograd holds on to, beside the inputs, is one state per chunk."""
    length, heads, rank = 16 * CHUNK, 2, 8
    leaves = [torch.rand(1, length, heads, rank, requires_grad=True) for _ in ScanInputs._fields]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reads = delta_rule_scan(ScanInputs(*leaves), torch.zeros(1, heads, rank, rank)).reads
    states = sum(t.numel() // (heads * rank * rank) for t in kept if t.shape[-2:] == (rank, rank))
    assert states == 16
    reads.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
