"""Validation against a slow count, and its independence of how windows are batched."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moekit.config import DataConfig, RunConfig
from moekit.data import TokenDataset, open_dataset, prepare, validation_windows
from moekit.data.sampler import Packing
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.nn.model import Model
from moekit.ops import reference
from moekit.train.hardware import Hardware
from moekit.train.validation import DomainScore, validate

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return load_tokenizer(data)


@pytest.fixture(scope="module")
def small(data: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Validation text in three domains: three short documents, one that is a single token, and one far longer."""
    folder = tmp_path_factory.mktemp("small")
    english = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 2
    texts = {"a": [english, "naïve — 床前明月光 🙂", "x" * 50], "one": ["x"], "z": [english * 4]}
    for name, documents in texts.items():
        lines = [f'{{"text": "{text}", "domain": "{name}"}}\n' for text in documents]
        (folder / f"{name}.valid.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "b.train.jsonl").write_text('{"text": "only to train on", "domain": "b"}\n')
    valid = sorted(folder.glob("*.valid.jsonl"))
    prepare([folder / "b.train.jsonl"], folder / "data", valid_paths=valid, tokenizer=data)
    return open_dataset(folder / "data", "valid")


@pytest.fixture
def model(run_config: Callable[..., RunConfig], device: torch.device) -> Model:
    torch.manual_seed(3)
    config = run_config(ffn={"n_shared_experts": 0}, model={"initializer_range": 0.3})
    return Model(config.model).double().to(device)


def score(
    model: Model,
    data: TokenDataset,
    tokenizer: Tokenizer,
    batch_size: int = 4,
    max_tokens: int = 10**6,
    across: bool = True,
) -> dict[str, DomainScore]:
    return validate(
        model,
        data,
        tokenizer.token_bytes(),
        Hardware(next(model.parameters()).device, autocast=False),
        DataConfig(path="", sequence_length=LENGTH, batch_size=batch_size, cross_document_attention=across),
        max_tokens,
    )


def test_scores_do_not_depend_on_the_batch_size(model: Model, small: TokenDataset, tokenizer: Tokenizer) -> None:
    found = [score(model, small, tokenizer, batch_size) for batch_size in (1, 3, 64)]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, one in found[0].items():
            assert other[name].loss == pytest.approx(one.loss, rel=1e-9)
            assert other[name].bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-9)
            assert other[name][2:] == one[2:]


@pytest.mark.parametrize("across", [True, False])
def test_a_score_is_the_slow_sum_over_single_windows(
    model: Model, small: TokenDataset, tokenizer: Tokenizer, across: bool
) -> None:
    start, stop = small.domain_range("a")
    ids = small.read(start, stop - start)
    documents = small.document_ids(start, stop - start)
    nats, load = 0.0, [Counter[int]() for _ in range(2)]
    for first in range(0, len(ids) - 1, LENGTH):
        window = ids[first : first + LENGTH][: len(ids) - 1 - first]
        pieces = [window]
        if not across:  # a document by itself: rotary attention knows only distances
            cuts = np.flatnonzero(np.diff(documents[first : first + len(window)])) + 1
            pieces = np.split(window, cuts)
        logits = []
        for piece in pieces:
            out = model(torch.tensor(piece).unsqueeze(0).to(model.norm.weight.device), return_routing=True)
            logits.append(out.logits[0].detach().cpu())
            for layer, routing in enumerate(out.routing):
                load[layer].update(routing.expert_ids.flatten().tolist())
        targets = torch.tensor(ids[first + 1 : first + 1 + len(window)])
        nats += float(reference.cross_entropy(torch.cat(logits), targets))
    found = score(model, small, tokenizer, across=across)["a"]
    assert found.tokens == len(ids) - 1
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-7)  # rotations are float32
    assert found.tokens_per_expert == [[counts[e] for e in range(8)] for counts in load]
    # every byte of the documents but those of the first token, which is not predicted
    whole = tokenizer.decode([i for i in ids.tolist() if i != tokenizer.eos_id])
    assert "naïve — 床前明月光 🙂" in whole
    seen = len(whole.encode()) - len(tokenizer.decode(ids[:1].tolist()).encode())
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / seen, rel=1e-7)


def test_padding_counts_in_no_experts_load(model: Model, small: TokenDataset, tokenizer: Tokenizer) -> None:
    for found in score(model, small, tokenizer).values():
        assert [sum(counts) for counts in found.tokens_per_expert] == [2 * found.tokens] * 2


def test_a_domain_without_validation_text_is_left_out(model: Model, small: TokenDataset, tokenizer: Tokenizer) -> None:
    assert small.domains == ["a", "b", "one", "z"]
    assert list(score(model, small, tokenizer)) == ["a", "one", "z"]


def test_only_the_first_tokens_of_each_domain_count(model: Model, small: TokenDataset, tokenizer: Tokenizer) -> None:
    found = score(model, small, tokenizer, max_tokens=2 * LENGTH + 5)
    assert {name: s.tokens for name, s in found.items()} == {"a": 2 * LENGTH + 5, "one": 1, "z": 2 * LENGTH + 5}


def test_a_domain_of_end_of_text_alone_counts_one_byte(model: Model, small: TokenDataset, tokenizer: Tokenizer) -> None:
    found = score(model, small, tokenizer)["one"]  # "x" is given, end-of-text is predicted: no byte
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))  # finite: infinity is no JSON
    assert math.isfinite(found.loss)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_and_without_gradients(
    model: Model, small: TokenDataset, tokenizer: Tokenizer, training: bool
) -> None:
    score(model.train(training), small, tokenizer)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_prompts_are_context_but_not_scored(
    packing: Packing, prompted: Path, run_config: Callable[..., RunConfig]
) -> None:
    dataset, tokenizer = open_dataset(prompted, "valid"), load_tokenizer(prompted)
    torch.manual_seed(3)
    model, hardware = (
        Model(run_config(model={"initializer_range": 0.3}).model).double(),
        Hardware(torch.device("cpu"), False),
    )
    data = run_config(data_packing=packing, data_sequence_length=32, data_batch_size=3).data
    (score,) = validate(model, dataset, tokenizer.token_bytes(), hardware, data, 10**6).values()
    nats, count = 0.0, 0
    for batch in validation_windows(dataset, "asked", 32, 10**6, 1, packing):
        ids, labels, documents = (torch.from_numpy(part) for part in batch)
        real = (documents >= 0)[0]
        logits, labels = model(ids[:, real]).logits[0], labels[0, real]
        answers = labels != -100
        nats += float(torch.nn.functional.cross_entropy(logits[answers], labels[answers], reduction="sum"))
        count += int(answers.sum())
    assert score.tokens == count < dataset.num_tokens - 11
    assert score.loss == pytest.approx(nats / count, rel=1e-9)
