"""Generation with a cache gives what generation without one gives, for every kind of model and any batch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import moekit
from moekit.errors import ConfigError
from moekit.generate import SamplingSettings, generate, tokens
from moekit.nn.model import Model

Build = Callable[..., Model]
VOCABULARY = 300  # of the models that `build` makes
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [250], [3, 3, 3]]


def continued(model: Model, prompts: Sequence[Sequence[int]], new: int = 12, **how: Any) -> list[list[int]]:
    """Returns the new tokens of each prompt."""
    columns = list(tokens(model, prompts, SamplingSettings(**how), new))
    return torch.stack(columns, dim=1).tolist()


@torch.no_grad()
def without_cache(model: Model, prompt: Sequence[int], new: int = 12, penalty: float = 1.0) -> list[int]:
    """Returns the greedy continuation, everything computed again for each token."""
    model.eval()
    ids = list(prompt)
    for _ in range(new):
        logits = model(torch.tensor([ids], device=model.norm.weight.device)).logits[0, -1].float().tolist()
        for seen in set(ids):
            logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
        ids.append(max(range(len(logits)), key=lambda i: (logits[i], -i)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["dense", "moe", "bias", "hash", "mla", "mla tied", "capacity"])
def test_greedy_with_a_cache_is_greedy_without_one_in_any_batch(build: Build, kind: str) -> None:
    model = build(kind)
    expected = [without_cache(model, prompt) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    assert continued(model, PROMPTS) == expected
    assert [continued(model, [prompt])[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("kind", ["moe", "mla", "hash"])
def test_a_seeded_text_is_the_same_alone_and_in_a_batch(build: Build, kind: str) -> None:
    model = build(kind)
    how: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2}
    together = continued(model, PROMPTS, seed=40, **how)
    assert [continued(model, [prompt], seed=40 + row, **how)[0] for row, prompt in enumerate(PROMPTS)] == together


def test_the_repetition_penalty_covers_prompt_and_new_tokens_and_no_padding(build: Build) -> None:
    model = build()
    expected = [without_cache(model, prompt, penalty=1.7) for prompt in PROMPTS]
    assert expected != [without_cache(model, prompt) for prompt in PROMPTS]
    assert continued(model, PROMPTS, repetition_penalty=1.7) == expected


def test_padding_is_no_token_that_was_seen(build: Build) -> None:
    model = build()
    (first,) = without_cache(model, [250], 1)
    with torch.no_grad():  # now the short prompt is continued with token 0, which fills the room behind it in a batch
        model.lm_head.weight[[0, first]] = model.lm_head.weight[[first, 0]]
    assert without_cache(model, [250], 1) == [0]
    assert continued(model, [[250], [5, 6, 7, 8]], 1, repetition_penalty=1e6)[0] == [0]


def test_top_k_of_one_is_greedy_even_among_equals(build: Build) -> None:
    model = build()
    assert continued(model, PROMPTS, temperature=3.0, top_k=1) == continued(model, PROMPTS)
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[::2]  # every token has a twin
    assert continued(model, PROMPTS, temperature=3.0, top_k=1) == continued(model, PROMPTS)


def test_a_seed_gives_the_same_text_and_another_seed_another(build: Build) -> None:
    model = build()
    texts = [continued(model, PROMPTS, temperature=1.0, seed=seed) for seed in (1, 1, 20)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    torch.manual_seed(0)
    first = continued(model, PROMPTS, temperature=1.0)
    torch.manual_seed(0)
    assert continued(model, PROMPTS, temperature=1.0) != first  # without a seed: another text every time


def test_equal_prompts_of_a_batch_get_different_texts(build: Build) -> None:
    rows = continued(build(), [[4, 5]] * 4, temperature=1.0, seed=0)
    assert len({tuple(row) for row in rows}) == 4


def test_generate_returns_prompt_and_new_tokens(build: Build, device: torch.device) -> None:
    model = build()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]], device=device)
    out = generate(model, ids, 4)
    assert out.shape == (2, 7)
    assert out.dtype == torch.int64
    assert out.device == ids.device
    assert torch.equal(out[:, :3], ids)
    assert out[:, 3:].tolist() == continued(model, ids.tolist(), 4)
    assert torch.equal(moekit.generate(model, ids, max_new_tokens=4), out)
    assert torch.equal(generate(model, ids, max_new_tokens=0), ids)
    assert generate(build(max_position_embeddings=65), ids[:, :1]).shape == (2, 65)
    how: dict[str, Any] = {"temperature": 1, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    expected = continued(model, ids.tolist(), 4, **{**how, "temperature": 1.0, "seed": 3})
    assert generate(model, ids, 4, **how, seed=3)[:, 3:].tolist() == expected


def test_it_runs_up_to_the_last_position_and_no_further(build: Build) -> None:
    model = build(max_position_embeddings=10)
    assert continued(model, [[1, 2, 3]], 7) == [without_cache(model, [1, 2, 3], 7)]
    with pytest.raises(ConfigError, match=r"max_position_embeddings, 10; ask for at most 7"):
        continued(model, [[1], [1, 2, 3]], 8)
    with pytest.raises(ConfigError, match="the prompt itself is too long"):
        continued(model, [[1] * 11], 1)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 1, "a prompt is empty"),
        ([[1], []], 1, "a prompt is empty"),
        ([[1, VOCABULARY]], 1, f"token {VOCABULARY} but the vocabulary has {VOCABULARY}"),
        ([[1, -1], [2]], 1, f"token -1 but the vocabulary has {VOCABULARY}"),
        ([[1]], 0, "max_new_tokens is 0 but must be at least 1"),
    ],
)
def test_what_cannot_be_continued_is_one_clear_line(
    build: Build, prompts: list[list[int]], new: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        continued(build(), prompts, new)
    assert "\n" not in str(caught.value)


def test_generate_refuses_bad_settings_and_shapes_in_one_line(build: Build) -> None:
    model, ids = build(), torch.tensor([[1, 2]])
    for message, wrong in (
        ("temperature is -1.0", {"temperature": -1}),
        ("top_k is 0", {"top_k": 0}),
        ("top_p is 2", {"top_p": 2.0}),
        ("max_new_tokens is -1", {"max_new_tokens": -1}),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(model, ids, **wrong)
    with pytest.raises(ConfigError, match=r"input_ids has shape \(2,\)"):
        generate(model, ids[0])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_even_when_the_caller_stops_early(build: Build, training: bool) -> None:
    model = build("capacity").train(training)
    steps = tokens(model, PROMPTS, SamplingSettings(), 5)
    next(steps)
    assert not model.training  # dropless, whatever the mode was
    steps.close()
    assert model.training is training
    continued(model, PROMPTS, 2)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_working_precisions_generate(build: Build, dtype: torch.dtype) -> None:
    for kind in ("moe", "mla", "bias", "hash"):
        rows = continued(build(kind).to(dtype), PROMPTS, 5, temperature=0.8, seed=0)
        assert [len(row) for row in rows] == [5, 5, 5]
