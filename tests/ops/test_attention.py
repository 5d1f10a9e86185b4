"""Attention equals the query-by-query reference, output and every gradient, by our kernels and by torch's."""

import pytest
import torch
from torch import Tensor

from moekit.ops import reference
from moekit.ops.attention import Seen, all_seen, attend, attention_mask, seen
from moekit.ops.kernels import attention as native

SHAPES = {  # batch, length, heads, kv_heads, head_dim, value_dim
    "one token": (2, 1, 2, 1, 3, 5),
    "odd sizes": (2, 7, 4, 2, 5, 6),
    "values narrower, as in MLA": (1, 40, 2, 2, 96, 64),
    "one head of keys": (2, 70, 4, 1, 33, 17),
    "more than a block": (1, 300, 4, 2, 64, 64),
    "values wider": (1, 521, 2, 1, 40, 72),
}
DOCUMENTS = ["one", "in a row", "any order"]


def inputs(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, kv_heads, width, value_width = shape
    widths = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    q, k, v = (torch.randn(batch, length, h, d, device=device).to(dtype).requires_grad_() for h, d in widths)
    return q, k, v


def documents(device: torch.device, kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "one":
        return None
    if kind == "any order":
        return torch.randint(0, 3, (batch, length), device=device)
    return (torch.rand(batch, length, device=device) < 0.04).cumsum(1)  # a new one every 25 tokens


def exactly(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, scale: float, causal: bool = True) -> Tensor:
    """Returns what torch's plain operations make of the formula, in float64."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    positions = torch.arange(length, device=q.device).expand(q.shape[:2])
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * scale
    last = positions if causal else torch.full_like(positions, length - 1)
    shares = scores.masked_fill(~attention_mask(last, length, ids), -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", shares, v.repeat_interleave(group, 2))


def worst(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Returns the largest error relative to the largest value of each tensor (to 0.1, where there is hardly one)."""
    pairs = zip(ours, expected, strict=True)
    return float(torch.stack([(a.double() - b).abs().max() / b.abs().max().clamp(min=0.1) for a, b in pairs]).max())


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 2, 5, 3), (1, 9, 2, 1, 4, 4)])
def test_attention_equals_the_reference_with_every_gradient(
    device: torch.device, shape: tuple[int, ...], kind: str
) -> None:
    leaves = inputs(device, torch.float64, *shape)
    ids = documents(device, kind, *shape[:2])
    y = attend(*leaves, Seen(document_ids=ids), 0.3)
    allowed = [None if ids is None else row[:, None] == row for row in (range(shape[0]) if ids is None else ids)]
    expected = torch.stack([reference.attention(*one, 0.3, mask) for *one, mask in zip(*leaves, allowed, strict=True)])
    exact, probe = exactly(*leaves, ids, 0.3), torch.randn_like(y)
    for other in (expected, exact):
        torch.testing.assert_close(y, other, rtol=0, atol=1e-12)
        theirs = torch.autograd.grad(other, leaves, probe, retain_graph=True)
        ours = torch.autograd.grad(y, leaves, probe, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # measured worst over these cases and five seeds, ours and torch's alike: 1.1e-6 and 1.1e-2
    [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)],
    ids=["float32", "bfloat16"],
)
def test_working_dtypes_stay_within_rounding_of_float64(
    device: torch.device, shape: tuple[int, ...], kind: str, causal: bool, dtype: torch.dtype, bound: float
) -> None:
    leaves = inputs(device, dtype, *shape)
    ids, scale = documents(device, kind, *shape[:2]), shape[4] ** -0.5
    y = attend(*leaves, Seen(document_ids=ids, causal=causal), scale)
    probe = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, probe)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = exactly(*exact, ids, scale, causal)
    expected = torch.autograd.grad(z, exact, probe.double())
    assert y.dtype == dtype
    assert all(gradient.dtype == dtype for gradient in gradients)
    assert worst((y.detach(), *gradients), (z.detach(), *expected)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_a_larger_tensor_are_read_where_they_lie(device: torch.device, dtype: torch.dtype) -> None:
    whole = torch.randn(2, 37, 3, 2 * 21, device=device).to(dtype).requires_grad_()
    wide = torch.randn(2, 3, 37, 21, device=device).to(dtype).requires_grad_()
    q, (k, v) = wide.transpose(1, 2), whole.chunk(2, dim=-1)
    y = attend(q, k, v, Seen(), 0.2)
    z = attend(q.contiguous(), k.contiguous(), v.contiguous(), Seen(), 0.2)
    torch.testing.assert_close(y, z, rtol=0, atol=0)
    probe = torch.randn_like(y).transpose(1, 2).contiguous().transpose(1, 2)  # a gradient that lies otherwise
    ours, theirs = (torch.autograd.grad(out, (wide, whole), probe) for out in (y, z))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_to_the_bit_whatever_the_threads(device: torch.device, dtype: torch.dtype) -> None:
    leaves = inputs(device, dtype, 2, 300, 4, 2, 64, 48)
    if native.unavailable(*leaves):
        pytest.skip("torch's kernels promise nothing")
    probe, runs, threads = torch.randn(2, 300, 4, 48).to(dtype), [], torch.get_num_threads()
    for n in (threads, threads, 3):
        torch.set_num_threads(n)
        y = attend(*leaves, Seen(), 0.125)
        runs.append((y, *torch.autograd.grad(y, leaves, probe)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (6, 1, 72, 64)], ids=["full", "latent"])
def test_later_queries_equal_the_same_queries_of_the_whole(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, ...]
) -> None:
    """Decoding and prefill in pieces: sequences of their own lengths, what lies behind the last key is not seen."""
    q, k, v = (t.detach() for t in inputs(device, dtype, 2, 290, *heads))
    whole = attend(q, k, v, Seen(), 0.2)
    for start, size in (((0, 0), 1), ((3, 250), 40), ((289, 17), 1), ((31, 33), 256)):
        positions = torch.tensor(start, device=device).unsqueeze(1) + torch.arange(size, device=device)
        which = positions[:, :, None, None]
        part = attend(q.take_along_dim(which, 1), k, v, seen(positions, 290), 0.2)
        # measured worst over five seeds, ours and torch's: 1.3e-6; 8e-3, for shares that are rounded or not
        bound = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]
        if native.unavailable(q, k, v) is None and size > 4:
            bound = 0  # a query's sums are the same in every call, but for the few of decoding
        torch.testing.assert_close(part, whole.take_along_dim(which, 1), rtol=0, atol=bound)


def test_later_queries_can_learn(device: torch.device) -> None:
    q, k, v = inputs(device, torch.float32, 1, 9, 2, 1, 8, 8)
    whole = attend(q, k, v, Seen(), 0.3)[:, 5:]
    part = attend(q[:, 5:], k, v, seen(torch.arange(5, 9, device=device).unsqueeze(0), 9), 0.3)
    probe = torch.randn_like(part)
    ours, theirs = (torch.autograd.grad(y, (q, k, v), probe) for y in (part, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_do_no_harm(device: torch.device, dtype: torch.dtype) -> None:
    """Scores of +-30000: one key takes nearly all, and no exponential overflows."""
    q, k, v = (
        t.detach() * factor for t, factor in zip(inputs(device, dtype, 1, 290, 2, 2, 8, 8), (64, 64, 1), strict=True)
    )
    y, exact = attend(q, k, v, Seen(), 1.0), exactly(q.double(), k.double(), v.double(), None, 1.0)
    # measured worst of five seeds 6e-4 (a score is rounded by 2e-3) and 7e-3
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=3e-2 if dtype == torch.bfloat16 else 1e-2)


def test_mask_lets_a_query_see_its_past_in_its_document_only(device: torch.device) -> None:
    positions = torch.arange(4, device=device).unsqueeze(0)
    mask = attention_mask(positions, 4, torch.tensor([[5, 5, 6, 6]], device=device))
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    later = attention_mask(torch.tensor([[2], [0]], device=device), 4)
    assert later[:, 0, 0].int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_no_mask_is_made_where_none_is_needed(device: torch.device) -> None:
    positions = torch.arange(4, device=device).expand(2, 4)
    assert seen(positions, 4) == Seen()
    assert all_seen() == Seen(causal=False)
    assert (seen(positions + 2, 6).mask is None) == native.has_kernels(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("documented", [False, True])
def test_padding_is_a_document_of_its_own(device: torch.device, documented: bool, dtype: torch.dtype) -> None:
    leaves = inputs(device, dtype, 3, 40, 4, 2, 5, 6)
    ids = torch.arange(40, device=device).expand(3, 40) // 17 if documented else None
    real = torch.arange(40, device=device) < torch.tensor([[40], [21], [0]], device=device)
    y = attend(*leaves, all_seen(ids, real), 0.3)
    probe = torch.randn_like(y) * real[:, :, None, None]
    gradients = torch.autograd.grad(y, leaves, probe)
    assert torch.isfinite(y).all()
    for row, count in enumerate((40, 21, 0)):
        q, k, v = (leaf[row : row + 1, :count].detach().double().requires_grad_() for leaf in leaves)
        alone = exactly(q, k, v, None if ids is None else ids[row : row + 1, :count], 0.3, causal=False)
        expected = torch.autograd.grad(alone, (q, k, v), probe[row : row + 1, :count].double())
        bound = 1e-12 if dtype == torch.float64 else 5e-6
        torch.testing.assert_close(y[row, :count].double(), alone[0], rtol=0, atol=bound)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours[row, :count].double(), theirs[0], rtol=0, atol=bound)
            assert not ours[row, count:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_no_number_reaches_all_that_see_it_and_no_other_head(
    device: torch.device, dtype: torch.dtype, which: str
) -> None:
    parts = dict(zip("qkv", inputs(device, dtype, 1, 300, 2, 2, 33, 40), strict=True))
    with torch.no_grad():
        parts[which][0, 70, 1, 3] = torch.nan
    y = attend(*parts.values(), Seen(), 0.2)
    broken = y.isnan().any(-1)[0]
    assert not broken[:, 0].any()
    assert which == "v" or not broken[:70, 1].any()  # a share of 0 times no number is none either
    assert broken[70, 1]
    assert not broken[71:, 1].any() if which == "q" else broken[71:, 1].all()
