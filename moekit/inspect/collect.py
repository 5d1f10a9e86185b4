"""One pass over text: what every routed expert was chosen for, in counts of a fixed size.

Whatever the text's length, the state is the same few arrays: counts by domain, position, token and pair of experts,
histograms of entropy and margin, and the best few contexts of each expert. All are sums of small tensor operations
over a batch (no Python per token), so the pass costs little more than the model itself, and the batch size does not
change them. Padding counts nowhere; a choice that no expert computes (id -1) counts nowhere either.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.config import MoEConfig
from moekit.errors import ConfigError, DataError
from moekit.inspect.text import Rows, Window, rows
from moekit.inspect.vocabulary import KINDS
from moekit.nn.model import Model
from moekit.nn.router import Router
from moekit.ops.routing import Routing, limit_groups

DOMAINS = 64
"""Most domains that are told apart."""
BLOCKS = 8
"""Each domain's windows are dealt to as many blocks, which are what the noise of an estimate is measured with."""
TOKEN_BYTES = 2**28
"""Most memory for counts by token. Where the vocabulary needs more, the ids that come first in the text have a count
of their own, as many as fit, and the others are counted together by kind."""
BINS = 160
LOWEST_MARGIN = 2.0**-20
"""Margins are told apart in eighths of a power of two from here to 1; entropies in 160ths of their largest value."""
EXAMPLES, CONTEXT = 4, 10
"""Contexts kept for an expert, at most one a window; tokens on either side."""
SAMPLE = 8
"""Windows that are kept whole, the first of each domain and then the next ones."""


class Stats(NamedTuple):
    """What one pass found. A choice is a token's choice of one expert: k a token and layer."""

    layers: list[int]
    """The MoE layers' places in the model."""
    k: int
    domains: list[str]
    windows: Int[np.ndarray, " domains"]
    tokens: Int[np.ndarray, " domains"]
    by_domain: Int[np.ndarray, "layers domains blocks experts"]
    by_position: Int[np.ndarray, "layers length experts"]
    by_token: Int[np.ndarray, "layers slots experts"]
    """A slot is one token id, or all other ids of a kind: the first slots, one a kind."""
    slot_ids: Int[np.ndarray, " slots"]
    """The token id that a slot counts, -1 where it counts the others of a kind."""
    slot_kinds: Int[np.ndarray, " slots"]
    slot_tokens: Int[np.ndarray, " slots"]
    """How often each came."""
    gate_mass: Float[np.ndarray, "layers experts"]
    """Sum of the weights."""
    together: Int[np.ndarray, "layers experts experts"]
    """Tokens that chose both; the diagonal is the load."""
    entropy: Int[np.ndarray, "layers bins"] | None
    """Tokens by the entropy of their scores; None for a router without scores."""
    entropy_sum: Float[np.ndarray, " layers"] | None
    """Bits."""
    margin: Int[np.ndarray, "layers bins"] | None
    """Tokens by the gap between the k-th and the next choice."""
    example_weights: Float[np.ndarray, "layers experts examples"]
    """The largest weights that the expert gave, -1 where there is none."""
    example_ids: Int[np.ndarray, "layers experts examples context"]
    """Their tokens, in the middle, among the neighbours; -1 beyond the window."""
    sample: list[Window]

    @property
    def load(self) -> Int[np.ndarray, "layers experts"]:
        """Choices of each expert."""
        found: np.ndarray = self.by_domain.sum((1, 2))
        return found

    @property
    def experts(self) -> int:
        return int(self.by_domain.shape[-1])


class Collector:
    """The state of a pass; `add` takes a batch's routing, `stats` gives what has come together."""

    def __init__(self, model: Model, kinds: Int[np.ndarray, " vocab"], length: int) -> None:
        ffn = model.config.ffn
        if not isinstance(ffn, MoEConfig) or not model.moe_layers:
            raise ConfigError("the model is dense, it has no routed experts to inspect; choose one with MoE layers")
        self.device = device = model.embed_tokens.weight.device
        self.ffn, self.layers = ffn, list(model.config.moe_layers)
        self.biases = [layer.router.expert_bias for layer in model.moe_layers if isinstance(layer.router, Router)]
        layers, experts = len(self.layers), ffn.n_routed_experts
        self.slots = min(len(kinds), TOKEN_BYTES // (4 * layers * (experts + 1))) + len(KINDS)
        self.slot_of, self.known, self.used = kinds.copy(), np.zeros(len(kinds), dtype=bool), len(KINDS)
        self.slot_ids, self.slot_kinds = np.full(self.slots, -1), np.arange(self.slots)
        self.domains: list[str] = []
        self.windows = np.zeros((DOMAINS, 2), dtype=np.int64)
        self.sample: list[Window] = []

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.by_domain = zeros(layers, DOMAINS * BLOCKS, experts)
        self.by_position = zeros(layers, length, experts)
        self.by_token = zeros(layers, self.slots, experts + 1, dtype=torch.int32)
        self.slot_tokens = zeros(self.slots + 1)
        self.gate_mass = zeros(layers, experts, dtype=torch.float64)
        self.together = zeros(layers, experts, experts)
        self.entropy, self.margin = zeros(layers, BINS + 1), zeros(layers, BINS + 1)
        self.entropy_sum = zeros(layers, dtype=torch.float64)
        self.example_weights = zeros(layers, EXAMPLES, experts, dtype=torch.float32) - 1
        self.example_ids = zeros(layers, EXAMPLES, experts, 2 * CONTEXT + 1, dtype=torch.int32) - 1
        self.scored = ffn.topk_method != "hash"

    def add(self, batch: Rows, routings: list[Routing]) -> None:
        """Adds a batch. `routings` are those of its tokens, one a MoE layer, in the model's order."""
        shape, device = batch.input_ids.shape, self.device
        blocks = torch.tensor([self._block(window) for window in batch.windows], device=device)
        slots = self._slots(batch).to(device)
        real = torch.ones(shape, dtype=torch.bool) if batch.real is None else batch.real
        counted = torch.where(real, batch.input_ids, -1)
        neighbours = torch.nn.functional.pad(counted.int(), (CONTEXT, CONTEXT), value=-1).to(device)
        contexts = neighbours.unfold(1, 2 * CONTEXT + 1, 1)  # (rows, length, context)
        real = real.flatten().to(device)
        self.slot_tokens.scatter_add_(0, torch.where(real, slots, self.slots), torch.ones_like(slots))
        for at, routing in enumerate(routings):
            self._add_layer(at, routing, shape, blocks, slots, contexts)
            if routing.scores is not None:
                self._add_scores(at, routing, real)

    def _add_layer(
        self, at: int, routing: Routing, shape: torch.Size, blocks: Tensor, slots: Tensor, contexts: Tensor
    ) -> None:
        experts = self.ffn.n_routed_experts
        ids = torch.where(routing.expert_ids < 0, experts, routing.expert_ids)  # at the side, and left out below
        spread = routing.weights.new_zeros(len(ids), experts + 1)
        chosen = spread.scatter(1, ids, 1.0)[:, :experts].float()
        gates = spread.scatter(1, ids, routing.weights.detach())[:, :experts].unflatten(0, shape)
        by_row = chosen.unflatten(0, shape)
        self.by_domain[at].index_add_(0, blocks, by_row.sum(1).long())
        self.by_position[at, : shape[1]] += by_row.sum(0).long()
        self.together[at] += (chosen.T @ chosen).long()  # exact: whole numbers below 2^24
        self.gate_mass[at] += gates.sum((0, 1), dtype=torch.float64)
        flat = (slots.unsqueeze(1) * (experts + 1) + ids).flatten()
        self.by_token[at].view(-1).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        best, place = gates.max(1)  # of each row: at most one example a window
        best = torch.where(best > 0, best, -1).float()
        found = contexts[torch.arange(shape[0], device=self.device).unsqueeze(1), place]
        weights, texts = torch.cat((self.example_weights[at], best)), torch.cat((self.example_ids[at], found))
        weights, order = weights.sort(dim=0, descending=True, stable=True)  # among equals the first that came stays
        order = order[:EXAMPLES].unsqueeze(-1).expand(-1, -1, texts.shape[-1])
        self.example_weights[at], self.example_ids[at] = weights[:EXAMPLES], texts.gather(0, order)

    def _add_scores(self, at: int, routing: Routing, real: Tensor) -> None:
        ffn, scores, ids = self.ffn, routing.scores, routing.expert_ids
        assert scores is not None
        scores = scores.detach()
        shares = scores / scores.sum(-1, keepdim=True)
        bits = torch.special.entr(shares).sum(-1) / np.log(2)
        self.entropy_sum[at] += torch.where(real, bits, 0).sum(dtype=torch.float64)
        most = max(np.log2(ffn.n_routed_experts), 1e-9)
        _count(self.entropy[at], bits / most * BINS, real)
        bias = self.biases[at]
        choice = scores if bias is None else scores + bias
        best = 2 if ffn.topk_method == "noaux_tc" else 1
        choice = limit_groups(choice, ffn.n_group, ffn.topk_group, best)
        last = choice.gather(1, ids.clamp(min=0)).amin(1)
        margin = last - choice.scatter(1, ids.clamp(min=0), -torch.inf).amax(1)
        # nobody to be chosen next: every allowed expert is; a dropped choice has no margin
        whole = real & margin.isfinite() & (ids >= 0).all(1)
        place = (margin.clamp(min=LOWEST_MARGIN).log2() - np.log2(LOWEST_MARGIN)) * 8
        _count(self.margin[at], torch.where(whole, place, 0), whole)

    def _block(self, window: Window) -> int:
        if window.domain not in self.domains:
            if len(self.domains) == DOMAINS:
                raise DataError(
                    f"the text has more than {DOMAINS} domains ({window.domain!r} is the next); take another field"
                )
            self.domains.append(window.domain)
        domain = self.domains.index(window.domain)
        self.windows[domain] += 1, len(window.tokens)
        if len(self.sample) < SAMPLE:
            self.sample.append(window)
        elif window.number == 0:  # in place of the last one of the domain that has most
            kept = [one.domain for one in self.sample]
            if (most := max(kept, key=kept.count)) and kept.count(most) > 1:
                del self.sample[len(kept) - 1 - kept[::-1].index(most)]
                self.sample.append(window)
        return domain * BLOCKS + window.number % BLOCKS

    def _slots(self, batch: Rows) -> Tensor:
        """Returns the slot of each token; ids that are new have one of their own while there are any."""
        ids = batch.input_ids.flatten().numpy()
        if self.used < self.slots:
            told = ids if batch.real is None else ids[batch.real.flatten().numpy()]
            fresh = told[~self.known[told]]
            if len(fresh):
                found, first = np.unique(fresh, return_index=True)
                found = found[np.argsort(first)][: self.slots - self.used]
                places = np.arange(self.used, self.used + len(found))
                self.slot_ids[places], self.slot_kinds[places] = found, self.slot_of[found]
                self.slot_of[found], self.known[found] = places, True
                self.used += len(found)
        return torch.from_numpy(self.slot_of[ids])

    def stats(self) -> Stats:
        """Returns what has come together so far."""
        domains = len(self.domains)
        by_domain = _numpy(self.by_domain)[:, : domains * BLOCKS]
        return Stats(
            layers=self.layers,
            k=self.ffn.num_experts_per_tok,
            domains=self.domains,
            windows=self.windows[:domains, 0],
            tokens=self.windows[:domains, 1],
            by_domain=by_domain.reshape(len(self.layers), domains, BLOCKS, -1),
            by_position=_numpy(self.by_position),
            by_token=_numpy(self.by_token)[:, : self.used, :-1],
            slot_ids=self.slot_ids[: self.used],
            slot_kinds=self.slot_kinds[: self.used],
            slot_tokens=_numpy(self.slot_tokens)[: self.used],
            gate_mass=_numpy(self.gate_mass),
            together=_numpy(self.together),
            entropy=_numpy(self.entropy)[:, :BINS] if self.scored else None,
            entropy_sum=_numpy(self.entropy_sum) if self.scored else None,
            margin=_numpy(self.margin)[:, :BINS] if self.scored else None,
            example_weights=_numpy(self.example_weights.transpose(1, 2)),
            example_ids=_numpy(self.example_ids.transpose(1, 2)),
            sample=self.sample,
        )


@torch.inference_mode()
def collect(
    model: Model, windows: Iterable[Window], kinds: Int[np.ndarray, " vocab"], length: int, batch_size: int = 8
) -> Stats:
    """Returns the statistics of the windows, none longer than `length`; `kinds` tell each token id's kind.

    Raises ConfigError for a dense model and DataError when there are no windows.
    """
    collector, device = Collector(model, kinds, length), model.embed_tokens.weight.device
    for batch in rows(windows, batch_size, model.config.vocab_size):
        mask = None if batch.real is None else batch.real.to(device)
        out = model(batch.input_ids.to(device), return_routing=True, padding_mask=mask, return_logits=False)
        collector.add(batch, out.routing)
    if not collector.domains:
        raise DataError("the text has no tokens, so there is nothing to inspect")
    return collector.stats()


def quantile(histogram: Int[np.ndarray, "layers bins"], at: float) -> Float[np.ndarray, " layers"]:
    """Returns the place, in bins, below which a share `at` of each layer's tokens lies; NaN without tokens."""
    total = histogram.sum(1)
    reached = np.cumsum(histogram, 1)
    first = np.argmax(reached >= np.maximum(at * total, 1)[:, None], axis=1)
    before = np.where(first > 0, np.take_along_axis(reached, np.maximum(first - 1, 0)[:, None], 1)[:, 0], 0)
    inside = np.take_along_axis(histogram, first[:, None], 1)[:, 0]
    place = first + (at * total - before) / np.maximum(inside, 1)
    return np.where(total > 0, np.maximum(place, 0), np.nan)


def margins(histogram: Int[np.ndarray, "layers bins"], at: float) -> Float[np.ndarray, " layers"]:
    """Returns the margin below which a share `at` of each layer's tokens lies."""
    return np.asarray(LOWEST_MARGIN * 2 ** (quantile(histogram, at) / 8))


def _count(histogram: Int[Tensor, " bins"], place: Float[Tensor, " tokens"], real: Tensor) -> None:
    """Adds one to the bin of each real token; the others go to the bin at the side, the last."""
    bins = torch.where(real, place.long().clamp(0, BINS - 1), BINS)
    histogram.scatter_add_(0, bins, torch.ones_like(bins))


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.cpu().numpy())
