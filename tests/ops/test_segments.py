"""Segments of sequences: means without padding, the shift within a sequence, and back."""

import pytest
import torch
from torch import Tensor

from moekit.ops.segments import joined, previous, segment_means, segment_tokens, segmented, sequence_means


def previous_means(x: Tensor, size: int, mask: Tensor | None = None) -> Tensor:
    """Returns what Lory's router reads: for each segment the mean of the one before it, 0 for the first."""
    means = segment_means(x, size, mask)
    return previous(means, torch.zeros_like(means[:, :1]))


def loop(x: Tensor, size: int, real: Tensor) -> Tensor:
    """Returns the mean of the real tokens of the segment before each, sequence by sequence."""
    rows = []
    for sequence, mask in zip(x, real, strict=True):
        means = [0 * sequence[0]]
        for first in range(0, len(sequence), size):
            kept = sequence[first : first + size][mask[first : first + size]]
            means.append(kept.mean(0) if len(kept) else torch.zeros_like(sequence[0]))
        rows.append(torch.stack(means[:-1]))
    return torch.stack(rows)


@pytest.mark.parametrize(("length", "size"), [(11, 4), (12, 4), (3, 4), (5, 1), (1, 1)])
def test_previous_means_and_their_gradients_equal_the_loop(length: int, size: int, device: torch.device) -> None:
    x = torch.randn(3, length, 5, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.arange(length, device=device) < torch.tensor([[length], [length - 1], [max(length // 2, 1)]]).to(
        device
    )
    found, expected = previous_means(x, size, mask), loop(x, size, mask)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((means * weight).sum(), x)[0] for means in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-14)


def test_a_first_segment_has_nothing_of_the_sequence_before_it_in_the_batch(device: torch.device) -> None:
    x = torch.ones(2, 8, 3, device=device)
    x[0, -4:] = torch.inf
    assert previous_means(x, 4).isfinite().all()


def test_segments_join_to_the_sequences_that_they_were_cut_from(device: torch.device) -> None:
    for batch, length in ((2, 11), (3, 4), (1, 0), (0, 5)):
        x = torch.randn(batch, length, 3, device=device)
        units = segmented(x, 4)
        assert units.shape == (batch * -(-length // 4), 4, 3)
        assert joined(units, batch, length).equal(x)


def test_means_are_float32_and_padding_counts_nowhere_whatever_it_holds(device: torch.device) -> None:
    x = torch.randn(2, 6, 3, device=device).bfloat16()
    mask = torch.tensor([[True] * 5 + [False], [True] * 2 + [False] * 4], device=device)
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    means = segment_means(dirty, 4, mask)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means[1], torch.stack((x[1, :2].float().mean(0), torch.zeros(3, device=device))))
    assert means[0].isfinite().all()
    assert segment_tokens(2, 6, 4, mask, device).tolist() == [[4, 1], [2, 0]]


def test_sequence_means_are_those_of_real_tokens_and_zero_where_there_are_none(device: torch.device) -> None:
    x = torch.randn(3, 5, 2, dtype=torch.float64, device=device)
    mask = torch.arange(5, device=device) < torch.tensor([[5], [2], [0]], device=device)
    x[1, 2:] = torch.nan  # whatever padding holds
    expected = torch.stack((x[0].mean(0), x[1, :2].mean(0), torch.zeros_like(x[2, 0])))
    torch.testing.assert_close(sequence_means(x, mask), expected)
    assert sequence_means(x[:, :0]).tolist() == [[0, 0]] * 3
    assert sequence_means(x.bfloat16()).dtype == torch.float32
