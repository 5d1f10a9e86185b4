"""Scoring of synthetic questions: generated answers, judged; the same whatever the batch size."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekit.cli import main
from moekit.config import ModelConfig
from moekit.data.synthetic import TASKS, Question, read_questions
from moekit.errors import ConfigError
from moekit.evaluate.synthetic import score
from moekit.formats.checkpoint import load
from moekit.formats.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moekit.nn.model import Model
from moekit.train.state import newest


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["bytes"], 257)


@pytest.fixture
def model(tiny_config: Callable[..., ModelConfig]) -> Model:
    return Model(tiny_config(vocab_size=257, max_position_embeddings=256)).double()


def constant(model: Model, tokenizer: Tokenizer, after: dict[str, str]) -> Model:
    """Returns the model as a table: the next token depends on the last one alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for number, (last, following) in enumerate(after.items()):
            (a,), b = tokenizer.encode(last), tokenizer.encode(following) or [tokenizer.eos_id]
            model.embed_tokens.weight[a, number] = 1.0
            model.lm_head.weight[b[0], number] = 1.0
    return model


def test_answers_do_not_depend_on_the_batch_size(model: Model, tokenizer: Tokenizer) -> None:
    questions = TASKS["shortest-path"].draw(0, 1, 20)[1] + TASKS["phone-book"].draw(0, 20, 7)[1]
    random.Random(0).shuffle(questions)
    whole = score(model, tokenizer, questions, batch_size=64)
    assert {len(set(one.answers)) > 1 for one in whole.values()} == {True}
    for size in (1, 5, 17):
        assert score(model, tokenizer, questions, batch_size=size) == whole


def test_a_model_that_writes_right_paths_is_right_and_shares_are_told_apart_by_length(
    model: Model, tokenizer: Tokenizer
) -> None:
    table = constant(model, tokenizer, {":": " ", " ": "a", "a": "c", "c": "e", "e": ""})
    questions = [
        Question(prompt=prompt, text=text, domain="shortest-path")
        for prompt, text in [
            ("ac ce; ae:", " ace"),
            ("ab be ac ce; ae:", " abe"),
            ("ae; ae:", " ae"),
            ("ce; ce:", " ce"),
        ]
    ]
    (found,) = score(table, tokenizer, questions).values()
    assert found.answers == [" ace"] * 4
    assert (found.all.right, found.all.questions) == (2, 4)
    assert {group: tuple(share) for group, share in found.by_group.items()} == {"1": (0, 2), "2": (2, 2)}
    assert found.all.accuracy == 0.5
    assert found.all.standard_error == 0.25


def test_an_answer_that_does_not_end_is_wrong_even_if_it_begins_right(model: Model, tokenizer: Tokenizer) -> None:
    questions = [Question(prompt="kq:", text=" 5", domain="phone-book")]
    ends = constant(model, tokenizer, {":": " ", " ": "5", "5": ""})
    assert score(ends, tokenizer, questions)["phone-book"].all.right == 1
    goes_on = constant(model, tokenizer, {":": " ", " ": "5", "5": "5"})
    assert score(goes_on, tokenizer, questions)["phone-book"].answers == [" 55"]
    assert score(goes_on, tokenizer, questions)["phone-book"].all.right == 0


def test_no_question_is_an_error(model: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no question"):
        score(model, tokenizer, [])


def test_prepare_train_and_score_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    drawn = ["--synthetic", "phone-book", "--examples", "4", "--questions", "3", "--seed", "7"]
    assert main(["prepare", *drawn, "--out", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["documents"] == 4
    tiny = "--model.vocab_size 257 --model.hidden_size 32 --model.num_hidden_layers 1 --schedule.kind constant"
    tiny += " --data.packing documents --data.sequence_length 64 --data.batch_size 1 --optimizer.lr 1e-2 --steps 150"
    tiny += " --data.cross_document_attention false"
    tiny += " --model.ffn.n_routed_experts 4 --model.ffn.num_experts_per_tok 1 --model.ffn.moe_intermediate_size 64"
    words = ["train", "tiny-deepseekmoe", "--data", str(data), "--out", str(run), "--quiet", "--device", "cpu"]
    assert main([*words, *tiny.split()]) == 0
    checkpoint = newest(run)
    assert checkpoint is not None
    questions = read_questions(data / "synthetic" / "questions.jsonl")
    (found,) = score(load(checkpoint), load_tokenizer(data), questions).values()
    assert found.all.right == 3, found.answers
