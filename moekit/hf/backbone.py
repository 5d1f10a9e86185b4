"""Our model behind transformers' protocol of a model without its head."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from moekit.errors import UnsupportedError
from moekit.hf.cache import Cache
from moekit.nn.model import Model

REFUSED = ("inputs_embeds", "output_hidden_states", "output_attentions", "probe")


class Output(MoeModelOutputWithPast):
    """transformers' output and the sum of the balance terms, each times its factor; None where there are none."""

    balance: Tensor | None = None


class Backbone(Model):
    """A moekit.Model that takes padding on any side and packed documents by their positions, and returns states."""

    def forward(  # type: ignore[override]  # transformers' signature, not ours
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **others: Any,
    ) -> Output:
        """Returns the states that the head reads; those of padding have no meaning.

        A cache is used where one is given or `use_cache` asks for it. Raises UnsupportedError for what has no place.
        """
        for name in REFUSED:
            if others.get(name) is not None and others[name] is not False:
                raise UnsupportedError(f"{name} is not supported by moekit's models; leave it out")
        if input_ids is None:
            raise UnsupportedError("input_ids is missing; moekit's models read tokens, not embeddings")
        cache = self._cache(past_key_values, use_cache)
        real = _real(attention_mask, input_ids)
        document_ids = None if cache is not None or real is not None else _documents(position_ids, input_ids)
        ids, order = input_ids, None
        if real is not None:  # real tokens first: ours are padded on the right
            order = (~real).to(torch.int8).argsort(dim=1, stable=True)
            ids, real = ids.gather(1, order), real.gather(1, order)
        held = None if cache is None else cache.room_for(ids, self.embed_tokens.weight.dtype)
        out = super().forward(ids, None, held, padding_mask=real, document_ids=document_ids, return_logits=False)
        hidden = out.hidden
        if order is not None:  # back to where they were
            hidden = hidden.gather(1, order.argsort(dim=1).unsqueeze(-1).expand_as(hidden))
        found = Output(last_hidden_state=hidden, past_key_values=cache)
        found.balance = sum(out.aux.values(), start=hidden.new_zeros((), dtype=torch.float32)) if out.aux else None
        return found

    def _cache(self, given: Any, wanted: bool) -> Cache | None:
        if given is not None and not isinstance(given, Cache):
            kind = type(given).__name__
            raise UnsupportedError(f"past_key_values is a {kind}; moekit's models make their own with use_cache=True")
        if given is None and not wanted:
            return None
        return Cache(self.config) if given is None else given


def _real(attention_mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """Returns which of these tokens are real, or None where all are; a mask may speak of past tokens too."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise UnsupportedError(f"attention_mask has {attention_mask.dim()} axes; moekit's models take (batch, length)")
    real = attention_mask[:, -ids.shape[1] :].bool()
    return None if bool(real.all()) else real


def _documents(position_ids: Tensor | None, ids: Tensor) -> Tensor | None:
    """Returns the document of each token where positions begin anew in a row, as packing has it, or None."""
    if position_ids is None:
        return None
    positions = position_ids.expand(ids.shape)
    begins = positions[:, 1:] != positions[:, :-1] + 1
    if bool((positions[:, 1:][begins] != 0).any()):
        raise UnsupportedError("position_ids must count up by one, from 0 again at the first token of each document")
    documents = torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
    return documents if bool(begins.any()) else None


def plain(backbone: Backbone) -> Model:
    """Returns a moekit.Model of the same weights, not a copy."""
    with torch.device("meta"):
        model = Model(backbone.config)
    model.load_state_dict(backbone.state_dict(), assign=True)
    if backbone.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.train(backbone.training)
