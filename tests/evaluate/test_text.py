"""Scores of text against a slow count, and their independence of how windows are batched."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from moekit.data import open_dataset, prepare
from moekit.data.text import Document
from moekit.errors import ConfigError, DataError
from moekit.evaluate import score_text
from moekit.evaluate.text import Encoded, encoded, mean, prefix, read_dataset, read_files, score_documents
from moekit.formats.tokenizer import Tokenizer, train_tokenizer
from moekit.nn.model import Model

ENGLISH = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of folly. "
CHINESE = "床前明月光"
CONTEXT = 48


def test_equal_probabilities_cost_the_logarithm_of_the_vocabulary(
    model: Model, tokenizer: Tokenizer, documents: list[Document]
) -> None:
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    found = score_text(uniform, tokenizer, documents)
    assert set(found) == {"long", "short", "zh"}
    for domain, score in found.items():
        texts = [document.text for document in documents if document.domain == domain]
        assert score.documents == len(texts)
        assert score.tokens == sum(len(tokenizer.encode(text)) for text in texts)  # each once
        assert score.bytes == sum(len(text.encode()) for text in texts)
        assert score.loss == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-7)
        assert score.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-6)
        assert score.bits_per_byte == pytest.approx(math.log2(tokenizer.vocab_size) * score.tokens / score.bytes)


def test_scores_do_not_depend_on_the_batch_size(model: Model, tokenizer: Tokenizer, documents: list[Document]) -> None:
    one, *others = (score_text(model, tokenizer, documents, batch_size=size) for size in (1, 3, 8))
    for other in others:
        for domain, score in one.items():
            assert other[domain] == pytest.approx(score, rel=1e-6)  # measured: at most 1e-7


def test_a_document_is_scored_by_itself_in_windows(
    model: Model, tokenizer: Tokenizer, documents: list[Document]
) -> None:
    nats = 0.0
    tokens = tokenizer.encode(ENGLISH * 5)
    assert len(tokens) > 2 * CONTEXT
    for start in range(0, len(tokens), CONTEXT):
        end = min(start + CONTEXT, len(tokens))
        seen = [tokenizer.eos_id, *tokens][max(0, end - CONTEXT) : end]
        logits = model(torch.tensor([seen])).logits[0, start - end :].detach().double()
        nats -= float(logits.log_softmax(-1).gather(1, torch.tensor(tokens[start:end])[:, None]).sum())
    document, other = documents[0], documents[2]._replace(domain="other")
    found = score_text(model, tokenizer, [other, document])["long"]
    assert found.loss == pytest.approx(nats / len(tokens), rel=1e-6)


def test_a_smaller_stride_is_another_number_of_the_same_tokens(
    model: Model, tokenizer: Tokenizer, documents: list[Document]
) -> None:
    wide, narrow = (score_text(model, tokenizer, documents[:1], stride=stride)["long"] for stride in (None, 8))
    assert narrow.tokens == wide.tokens
    assert narrow.loss != pytest.approx(wide.loss, rel=1e-4)


def test_a_shorter_sequence_length_is_that_of_a_shorter_model(
    model: Model, tokenizer: Tokenizer, documents: list[Document]
) -> None:
    config = model.config.model_copy(update={"max_position_embeddings": 16})
    short = Model(config).eval()
    short.load_state_dict(model.state_dict())
    assert score_text(model, tokenizer, documents, sequence_length=16) == score_text(short, tokenizer, documents)


def test_documents_without_tokens_add_nothing(model: Model) -> None:
    empty, one = Encoded("a", [], 0), Encoded("a", [7], 1)
    assert score_documents(model, [empty], 0) == {}
    found = score_documents(model, [empty, one, Encoded("b", [], 0)], 0)
    assert found == {"a": score_documents(model, [one], 0)["a"]._replace(documents=2)}


def test_the_first_token_follows_the_beginning_of_text_where_there_is_one(tokenizer: Tokenizer) -> None:
    assert prefix(tokenizer) == tokenizer.eos_id
    data = json.loads(tokenizer.data)
    data["added_tokens"].append({**data["added_tokens"][0], "id": tokenizer.vocab_size, "content": "<s>"})
    assert prefix(Tokenizer(json.dumps(data).encode())) == tokenizer.vocab_size


def test_the_mean_counts_each_domain_once(model: Model, tokenizer: Tokenizer, documents: list[Document]) -> None:
    scores = score_text(model, tokenizer, documents)
    found = mean(scores)
    assert found["loss"] == pytest.approx(sum(score.loss for score in scores.values()) / 3)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_files_and_prepared_data_of_the_same_text_score_the_same(
    model: Model, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for domain, texts in {"a": [ENGLISH, "x"], "zh": [CHINESE]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{domain}.valid.jsonl").write_text(lines)
    (tmp_path / "train.txt").write_text(ENGLISH)
    tokenizer.save(tmp_path / "tokenizer")
    files = sorted(tmp_path.glob("*.valid.jsonl"))
    prepare([tmp_path / "train.txt"], tmp_path / "data", valid_paths=files, tokenizer=tmp_path / "tokenizer")
    data = open_dataset(tmp_path / "data", "valid")
    assert score_documents(model, read_dataset(data, tokenizer), tokenizer.eos_id) == score_documents(
        model, encoded(tokenizer, read_files(files)), tokenizer.eos_id
    )
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        list(read_dataset(data, train_tokenizer([CHINESE], 280)))


def test_text_is_read_as_it_is_scored(model: Model, tokenizer: Tokenizer) -> None:
    """Only so much text is held as a pool of windows needs, and one batch for the tokenizer."""
    text, read, progress = ENGLISH * 40, 0, []

    def documents() -> object:
        nonlocal read
        for number in range(800):
            read = number
            yield Document(text, "a", "")

    def watched() -> object:
        for one in encoded(tokenizer, documents()):  # type: ignore[arg-type]
            progress.append(read)
            yield one

    stream = watched()
    next(stream)
    assert progress == [read]
    assert read < 400


def test_windows_that_the_model_has_no_room_for_are_refused(
    model: Model, tokenizer: Tokenizer, documents: list[Document]
) -> None:
    with pytest.raises(ConfigError, match=f"sequence_length is 49 but must be 1 to {CONTEXT}"):
        score_text(model, tokenizer, documents, sequence_length=49)
    with pytest.raises(ConfigError, match="stride is 9 but must be 1 to 8"):  # tokens between windows would be lost
        score_text(model, tokenizer, documents, sequence_length=8, stride=9)


def test_a_loss_that_is_not_a_number_is_an_error(model: Model, tokenizer: Tokenizer, documents: list[Document]) -> None:
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ConfigError, match="the loss of short is nan"):
        score_text(broken, tokenizer, documents[1:2])
