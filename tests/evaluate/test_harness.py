"""Somebody else's code: the harness's own class, on transformers' own models, gives the numbers that ours gives."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import moekit
from moekit.data.text import Document
from moekit.errors import ConfigError, UnsupportedError
from moekit.evaluate import score_text
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moekit.evaluate.harness import MoekitLM  # noqa: E402

CONTEXT = 48
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "decoder_sparse_step": 1,
}
QUESTIONS = [
    ("It was the best of times,", [" it was the worst of times", " it was not", " x"]),
    ("naïve 🙂 " * 12, [" it was the age of wisdom", " folly", "的的"]),  # longer than the context
    ("", ["It was", "the age of folly. " * 3]),
    ("trailing space ", ["moves", " on"]),
    ("answer:", [" A", " B", " C", " D"]),
]


class Pair(NamedTuple):
    theirs: Any
    ours: Callable[..., MoekitLM]


@pytest.fixture(scope="module", params=["llama", "qwen2_moe"])
def pair(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(2)
    folder, size = tmp_path_factory.mktemp(request.param), {"vocab_size": tokenizer.vocab_size, **SIZES}
    if request.param == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    else:
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**size, **EXPERTS))
    model.generation_config.eos_token_id = tokenizer.eos_id
    model.eval().save_pretrained(folder)
    tokenizer.save(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=loaded, batch_size=2, device="cpu", max_length=CONTEXT)
    ours = moekit.load(folder)
    return Pair(theirs, lambda size: MoekitLM(ours, tokenizer, size))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_rolling_log_likelihoods_are_the_harness_s(pair: Pair, documents: list[Document]) -> None:
    asked = requests("loglikelihood_rolling", *((document.text,) for document in documents))
    expected = pair.theirs.loglikelihood_rolling(asked)
    for size in (1, 3, 8):
        assert pair.ours(size).loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-6)  # measured: 2e-7


def test_bits_per_byte_of_text_are_the_harness_s(pair: Pair, documents: list[Document]) -> None:
    asked = requests("loglikelihood_rolling", *((document.text,) for document in documents))
    found = pair.theirs.loglikelihood_rolling(asked)
    harness = pair.ours(4)
    for domain, score in score_text(harness.model, harness.vocabulary, documents).items():
        own = [n for n, document in enumerate(documents) if document.domain == domain]
        nats, size = -sum(found[n] for n in own), sum(len(documents[n].text.encode()) for n in own)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_log_likelihoods_of_answers_are_the_harness_s(pair: Pair) -> None:
    asked = requests("loglikelihood", *((question, answer) for question, group in QUESTIONS for answer in group))
    expected = pair.theirs.loglikelihood(asked)
    for size in (1, 3, 8):
        harness = pair.ours(size)
        found = harness.loglikelihood(asked)
        for (log, greedy), (their_log, their_greedy) in zip(found, expected, strict=True):
            assert log == pytest.approx(their_log, abs=1e-4)  # measured: 1e-5
            assert greedy == their_greedy
        assert harness.truncated == 3


def test_log_likelihoods_do_not_depend_on_the_batch_size(pair: Pair) -> None:
    asked = requests("loglikelihood", *((question, answer) for question, group in QUESTIONS for answer in group))
    one, *others = (pair.ours(size).loglikelihood(asked) for size in (1, 3, 8))
    for other in others:
        assert [log for log, _ in other] == pytest.approx([log for log, _ in one], rel=1e-6)


def test_what_is_written_is_the_harness_s(pair: Pair) -> None:
    settings = {"until": ["\n", "of"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", *((question or "The", settings) for question, _ in QUESTIONS))
    expected = pair.theirs.generate_until(asked)
    assert len(set(expected)) > 2
    for size in (1, 3, 8):
        assert pair.ours(size).generate_until(asked) == expected


def test_a_continuation_longer_than_the_context_is_scored_in_windows(model: Model, tokenizer: Tokenizer) -> None:
    text = "It was the age of folly. " * 20
    harness = MoekitLM(model, tokenizer)
    ((log, _),) = harness.loglikelihood(requests("loglikelihood", ("", text)))
    (rolled,) = harness.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert log == pytest.approx(rolled, rel=1e-7)
    assert harness.truncated == 1


def test_nothing_to_continue_by_is_certain(model: Model, tokenizer: Tokenizer) -> None:
    assert MoekitLM(model, tokenizer).loglikelihood(requests("loglikelihood", ("a", ""))) == [(0, True)]


def test_no_more_is_generated_than_half_of_the_positions(model: Model, tokenizer: Tokenizer) -> None:
    harness = MoekitLM(model, tokenizer, max_length=20)
    assert harness.generation({"max_gen_toks": 500, "until": "."}) == (["."], 10)
    assert harness.generation({}) == ([], 10)
    prompt = "It was " * 30
    (text,) = harness.generate_until(requests("generate_until", (prompt, {"max_gen_toks": 500})))
    kept = torch.tensor([tokenizer.encode(prompt)[-10:]])
    assert text == tokenizer.decode(moekit.generate(model, kept, 10)[0, 10:].tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"max_length": 49}, "max_length is 49 but must be 2 to 48"),
        ({"tokenizer": None}, "tokenizer is missing"),
    ],
)
def test_what_cannot_be_had_is_refused(
    model: Model, tokenizer: Tokenizer, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MoekitLM(model, **{"tokenizer": tokenizer, **settings})


def test_sampling_is_refused(model: Model, tokenizer: Tokenizer) -> None:
    asked = requests("generate_until", ("It", {"do_sample": True, "temperature": 0.7}))
    with pytest.raises(UnsupportedError, match="decodes greedily only"):
        MoekitLM(model, tokenizer).generate_until(asked)


def test_the_harness_knows_the_model_by_name(model: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    moekit.save(model, tmp_path / "model", tokenizer)
    rows = [{"question": "It was the", "choices": ["age", "times"], "answer": number % 2} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.yaml").write_text(
        "task: rows\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tmp_path / 'rows.jsonl'}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    where = {"pretrained": str(tmp_path / "model"), "dtype": "float32"}
    found = lm_eval.simple_evaluate("moekit", where, ["rows"], task_manager=manager, batch_size=3, device="cpu")
    assert found["results"]["rows"]["acc,none"] == 0.5
