"""The decoding loop: prompts in, tokens out, one step at a time."""

import secrets
import threading
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moekit.config import validate
from moekit.errors import ConfigError
from moekit.generate.sampling import SamplingSettings, draw
from moekit.nn.cache import KVCache
from moekit.nn.decoder import decoder
from moekit.nn.graphed import graphed
from moekit.nn.model import Model

FEW = 16
"""Sequences up to which a step reads weights rather than computes, so that the native one is taken."""


_running: WeakKeyDictionary[Model, tuple[list[nn.Module], list[None]]] = WeakKeyDictionary()
"""The models that generate: the modules that were in training mode before, and an entry for each text under way."""
_mode = threading.Lock()


def _begin(model: Model) -> None:
    """Sets evaluation mode; other threads may be generating with the model."""
    with _mode:
        if model not in _running:
            _running[model] = [module for module in model.modules() if module.training], []
        _running[model][1].append(None)
        model.eval()


def _end(model: Model) -> None:
    """Sets the mode from before the first of those that are under way when the last of them ends."""
    with _mode:
        trained, texts = _running[model]
        texts.pop()
        if not texts:
            del _running[model]
            for module in trained:
                module.training = True


@torch.no_grad()
def tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    max_new_tokens: int,
    vocabulary: int | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yields the next token of every sequence, `max_new_tokens` times. Prompts may differ in length.

    `vocabulary` is the tokenizer's number of entries where the model has more: ids behind it stand for no text and are
    never chosen. The caller stops when all its sequences have ended; until then weights must not be replaced by others.
    Raises ConfigError for an empty prompt, a token outside of the vocabulary, or more tokens than the model has
    positions.
    """
    model.config.check_decoder("generation")
    if not prompts or not all(prompts):
        raise ConfigError("a prompt is empty; give at least one token (the end-of-text token starts a new document)")
    vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
    longest, batch = max(map(len, prompts)), len(prompts)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} but must be at least 1")
    if foreign := [token for prompt in prompts for token in prompt if not 0 <= token < vocab]:
        raise ConfigError(f"a prompt holds token {foreign[0]} but the vocabulary has {vocab}; is this its tokenizer?")
    if longest + max_new_tokens > limit:
        advice = f"ask for at most {limit - longest}" if longest < limit else "the prompt itself is too long"
        raise ConfigError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, together more than "
            f"max_position_embeddings, {limit}; {advice}"
        )
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    cache = KVCache(model.config, batch, longest + max_new_tokens, device, dtype)
    seen = torch.zeros(batch, vocab, dtype=torch.bool, device=device).scatter_(1, ids.where(mask, ids[:, :1]), True)
    seed = secrets.randbits(60) if settings.seed is None else settings.seed
    generators = [torch.Generator(device).manual_seed(seed + number) for number in range(batch)]
    _begin(model)
    try:
        last = model(ids, cache=cache, padding_mask=mask, logits_to_keep=lengths - 1).logits[:, -1]
        fast = (decoder(model, cache) if batch <= FEW else None) or graphed(model, cache)
        for left in range(max_new_tokens, 0, -1):
            if vocabulary is not None:
                last[:, vocabulary:] = -torch.inf
            chosen = draw(last, settings, seen, generators)
            seen.scatter_(1, chosen.unsqueeze(1), True)
            yield chosen
            if left > 1:
                if fast is None:
                    last = model(chosen.unsqueeze(1), cache=cache).logits[:, -1]
                else:
                    last = fast.step(chosen, cache.lengths)
                    cache.advance(torch.ones_like(cache.lengths), 1)
    finally:
        _end(model)


def generate(
    model: Model,
    input_ids: Int[Tensor, "batch length"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Int[Tensor, "batch total"]:
    """Returns prompt and new tokens, (batch, length + max_new_tokens); greedy at temperature 0.

    All sequences run to the full length; `complete` stops at the end of the text or at a stop string.
    """
    if input_ids.dim() != 2:
        raise ConfigError(f"input_ids has shape {tuple(input_ids.shape)} but must be (batch, length)")
    given = {
        "temperature": float(temperature),
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": float(repetition_penalty),
        "seed": seed,
    }
    settings = validate(SamplingSettings, given)
    new = list(tokens(model, input_ids.tolist(), settings, max_new_tokens)) if max_new_tokens else []
    return torch.cat([input_ids, *(chosen.unsqueeze(1).to(input_ids.device) for chosen in new)], dim=1)
