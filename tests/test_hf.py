"""Our models in transformers, PEFT, TRL and lm-evaluation-harness: the same numbers, and nothing lost silently."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moekit
from moekit.config import MLAConfig, ModelConfig
from moekit.errors import CheckpointError, MoekitError, UnsupportedError
from moekit.formats.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
hf = pytest.importorskip("moekit.hf")

TEXT = "one two three four five six seven"


def config(**changes: Any) -> ModelConfig:
    return moekit.preset("tiny-deepseekmoe").model_copy(update={"num_hidden_layers": 2, "vocab_size": 320, **changes})


def latent() -> ModelConfig:
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    return config(attention=MLAConfig(num_attention_heads=2, **sizes))


def other(kind: str, **settings: Any) -> ModelConfig:
    ffn = {"kind": kind, "intermediate_size": 26, "n_routed_experts": 3, **settings}
    return ModelConfig.model_validate(config().model_dump() | {"ffn": ffn})


VARIANTS = {
    "MEO": other("meo", num_experts_per_tok=2, level="segment", segment_size=4),
    "Lory": other("lory", segment_size=4),
    "muMoE": other("mumoe"),
}


def written(path: Path, settings: ModelConfig | None = None, layout: str = "moekit") -> moekit.Model:
    """Returns a model after saving it; its weights are large enough that greedy choices are not ties."""
    torch.manual_seed(0)
    model = moekit.Model(settings or config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    moekit.save(model, path, tokenizer=train_tokenizer([TEXT + "\n"], 270), layout=layout)
    return model


@pytest.fixture(params=["moekit", "deepseek"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    written(tmp_path / "model", layout=request.param)
    return tmp_path / "model"


def opened(folder: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model.generation_config.eos_token_id = None  # compared to the full length
    return model


def same(one: moekit.Model, other: moekit.Model) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings",
    [config(), latent(), config(tie_word_embeddings=True), *VARIANTS.values()],
    ids=["mha", "mla", "tied", *VARIANTS],
)
def test_a_directory_loads_by_auto_class_computes_the_same_and_is_written_back(
    tmp_path: Path, settings: ModelConfig
) -> None:
    model, ids = written(tmp_path / "model", settings), random_ids(2, 9)
    wrapped = opened(tmp_path / "model")
    assert torch.equal(wrapped(ids).logits, model(ids).logits)
    few, all_of_them = wrapped(ids, logits_to_keep=2).logits, model(ids).logits
    torch.testing.assert_close(few, all_of_them[:, -2:], rtol=1e-5, atol=1e-6)  # few rows are summed in another order
    wrapped.save_pretrained(tmp_path / "again")
    again = moekit.load(tmp_path / "again")
    assert again.config == settings
    assert same(again, model)
    assert same(opened(tmp_path / "again").to_moekit(), model)


@pytest.mark.parametrize("settings", [config(), latent(), *VARIANTS.values()], ids=["mha", "mla", *VARIANTS])
def test_greedy_generation_is_ours_with_cache_and_without_and_with_padding_on_the_left(
    tmp_path: Path, settings: ModelConfig
) -> None:
    model, ids = written(tmp_path / "model", settings), random_ids(3, 9)
    wrapped = opened(tmp_path / "model")
    expected = moekit.generate(model, ids, max_new_tokens=12)
    decides_once = settings.ffn.kind == "lory"  # by its prompt, which is the cache's to know
    for use_cache in (True,) if decides_once else (True, False):
        found = wrapped.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        assert torch.equal(found, expected)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    found = wrapped.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, padding in enumerate((4, 1, 0)):
        alone = moekit.generate(model, ids[row : row + 1, padding:], max_new_tokens=12)
        assert torch.equal(found[row : row + 1, padding:], alone)


def test_padding_on_either_side_changes_no_logits_and_no_loss(folder: Path) -> None:
    wrapped, ids = opened(folder), random_ids(1, 6)
    alone = wrapped(ids, labels=ids)
    for pad in ((3, 0), (0, 3)):
        padded = torch.nn.functional.pad(ids, pad)
        mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
        out = wrapped(padded, attention_mask=mask, labels=padded)
        torch.testing.assert_close(out.logits[:, pad[0] : pad[0] + 6], alone.logits)
        if pad[0] == 0:
            torch.testing.assert_close(out.loss, alone.loss)


def test_beams_reorder_the_cache(folder: Path) -> None:
    wrapped, ids = opened(folder), random_ids(2, 5)
    found = [
        wrapped.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*found)


def test_a_long_generation_makes_the_cache_longer(tmp_path: Path) -> None:
    model, ids = written(tmp_path / "model", config(max_position_embeddings=512)), random_ids(1, 3)
    found = opened(tmp_path / "model").generate(ids, max_new_tokens=300, do_sample=False)
    assert torch.equal(found, moekit.generate(model, ids, max_new_tokens=300))


def test_positions_that_begin_anew_keep_documents_apart(folder: Path) -> None:
    wrapped, ids = opened(folder), random_ids(1, 8)
    packed = wrapped(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])).logits
    torch.testing.assert_close(packed[:, 3:], wrapped(ids[:, 3:]).logits)
    with pytest.raises(UnsupportedError, match="position_ids must count up by one"):
        wrapped(ids, position_ids=torch.tensor([[0, 1, 2, 7, 8, 9, 10, 11]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 1, 1)}, "inputs_embeds is not supported"),
        ({"probe": (1, False, None, True)}, "probe is not supported"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values is a DynamicCache"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask has 4 axes"),
    ],
)
def test_what_the_model_cannot_do_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        opened(folder)(random_ids(1, 4), **options)
    with pytest.raises(UnsupportedError, match="cannot be made 400"):
        opened(folder).resize_token_embeddings(400)


def test_loading_is_strict(folder: Path) -> None:
    other = hf.MoekitConfig.of(config(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="does not fit the configuration that is given: missing_keys"):
        opened(folder, config=other)
    with pytest.raises(UnsupportedError, match="key_mapping is not supported"):
        opened(folder, key_mapping={"a": "b"})
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        opened(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tensor .*experts\.3\.up_proj|has no manifest\.json"):
        opened(folder)


def test_shards_are_as_large_as_asked_and_other_options_are_refused(folder: Path, tmp_path: Path) -> None:
    wrapped = opened(folder)
    wrapped.save_pretrained(tmp_path / "saved", max_shard_size="150 KB")
    shards = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(sum(t.nbytes for t in load_file(shard).values()) for shard in shards) <= 150_000
    assert same(moekit.load(tmp_path / "saved"), wrapped.to_moekit())
    for option, message in (
        ({"max_shard_size": "huge"}, "max_shard_size is 'huge'"),
        ({"variant": "fp16"}, "variant is"),
    ):
        with pytest.raises(MoekitError, match=message):
            wrapped.save_pretrained(tmp_path / "other", **option)
    assert not (tmp_path / "other").exists()


def test_a_save_that_fails_leaves_the_model_that_was_there(folder: Path, tmp_path: Path) -> None:
    wrapped = opened(folder)
    wrapped.save_pretrained(tmp_path / "saved", max_shard_size="150KB")
    before = sorted(file.name for file in (tmp_path / "saved").iterdir())
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as a full disk: the write itself fails
        with pytest.raises(OSError, match="File too large"):
            wrapped.save_pretrained(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == before
    assert same(moekit.load(tmp_path / "saved"), wrapped.to_moekit())


def test_the_released_layout_loads_without_remote_code_and_keeps_its_fields(tmp_path: Path) -> None:
    """A directory as the ecosystem has it: no manifest, an auto_map, fields of the released config.json."""
    model = written(tmp_path / "model", layout="deepseek")
    for name in ("manifest.json", "receipt.json"):
        (tmp_path / "model" / name).unlink()
    file = tmp_path / "model" / "config.json"
    code = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}
    more = {"auto_map": code, "pretraining_tp": 1, "rope_scaling": None, "ep_size": 1}
    fields = json.loads(file.read_text()) | more
    file.write_text(json.dumps(fields))
    wrapped, ids = opened(tmp_path / "model"), random_ids(2, 9)
    assert type(wrapped) is hf.DeepseekForCausalLM
    assert torch.equal(wrapped(ids).logits, model(ids).logits)
    wrapped.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: kept.get(name) for name in fields.keys() - {"torch_dtype", "architectures"}} == {
        name: fields[name] for name in fields.keys() - {"torch_dtype", "architectures"}
    }
    assert same(moekit.load(tmp_path / "again"), model)
    with pytest.raises(UnsupportedError, match="deepseek"):
        hf.DeepseekConfig.of(latent())


def test_a_state_dict_in_the_names_of_the_file_is_put_together(folder: Path) -> None:
    wrapped = transformers.AutoModelForCausalLM.from_config(hf.MoekitConfig.of(config()))
    assert not same(wrapped.to_moekit(), moekit.load(folder))
    result = wrapped.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert same(wrapped.to_moekit(), moekit.load(folder))


def test_a_model_from_a_configuration_is_drawn_as_ours_is() -> None:
    torch.manual_seed(3)
    expected = moekit.Model(config())
    torch.manual_seed(3)
    assert same(transformers.AutoModelForCausalLM.from_config(hf.MoekitConfig.of(config())).to_moekit(), expected)


def test_the_loss_of_training_holds_the_balance_terms_and_that_of_evaluation_does_not(folder: Path) -> None:
    model, wrapped, ids = moekit.load(folder), opened(folder), random_ids(2, 9)
    assert torch.allclose(wrapped(ids, labels=ids).loss, model(ids, labels=ids).loss, atol=1e-6)
    model.train()
    wrapped.train()
    ours, out = model(ids, labels=ids), wrapped(ids, labels=ids)
    balance = sum(ours.aux.values())
    assert torch.equal(out.aux_loss, balance)
    assert balance > 0
    torch.testing.assert_close(out.loss, ours.loss + balance)
    halves = [wrapped(half, labels=half, num_items_in_batch=torch.tensor(16)) for half in ids.split(1)]
    expected = ours.loss + sum(half.aux_loss for half in halves) / 2
    torch.testing.assert_close(sum(half.loss for half in halves), expected)
    wrapped.activation_checkpointing_enable()
    assert wrapped.model.recompute
    assert torch.equal(wrapped(ids, labels=ids).loss, out.loss)


def test_the_pipeline_generates_text(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pipe = transformers.pipeline("text-generation", model=opened(folder), tokenizer=tokenizer)
    (found,) = pipe("one two", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("one two")


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    fixed = {"use_cpu": True, "report_to": [], "logging_steps": 1, "disable_tqdm": True, "seed": 0}
    return {"output_dir": str(folder / "run"), "per_device_train_batch_size": 2, **fixed, **options}


def test_trainer_trains_recomputing_saves_and_resumes(folder: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 12)]
    settings = arguments(folder, save_steps=2, learning_rate=1e-3, gradient_checkpointing=True)
    first = transformers.Trainer(opened(folder), transformers.TrainingArguments(max_steps=4, **settings), None, rows)
    first.train()
    second = transformers.Trainer(opened(folder), transformers.TrainingArguments(max_steps=4, **settings), None, rows)
    second.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert not same(first.model.to_moekit(), moekit.load(folder))
    assert same(second.model.to_moekit(), first.model.to_moekit())
    assert same(moekit.load(folder / "run" / "checkpoint-4"), first.model.to_moekit())


def test_a_plain_trainer_logs_the_balance_loss_beside_the_loss(folder: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 12)]
    given = transformers.TrainingArguments(max_steps=3, gradient_accumulation_steps=2, **arguments(folder))
    trainer = transformers.Trainer(opened(folder), given, None, rows, callbacks=[moekit.hf.LogAuxLoss()])
    seen = []
    trainer.model.register_forward_hook(lambda model, inputs, out: seen.append(out.aux_loss.item()))
    trainer.train()
    logged = [entry["aux_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(pair) / 2 for pair in zip(seen[::2], seen[1::2], strict=True)])
    assert len(logged) == 3
    plain = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL_LLAMA))
    with pytest.raises(UnsupportedError, match="LogAuxLoss is for moekit's models; this one is a LlamaForCausalLM"):
        transformers.Trainer(plain, given, None, rows, callbacks=[moekit.hf.LogAuxLoss()]).train()


SMALL_LLAMA = {"vocab_size": 280, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
LORA = {"r": 4, "target_modules": ["q_proj", "o_proj", "shared_experts.up_proj"], "task_type": "CAUSAL_LM"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("targets", [{}, {"target_parameters": EXPERTS}], ids=["linear", "experts"])
def test_lora_trains_adapters_alone_and_merges(folder: Path, tmp_path: Path, targets: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    ids = random_ids(2, 12)
    adapted = peft.get_peft_model(opened(folder), peft.LoraConfig(**LORA, **targets)).train()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert any("experts" in name and "shared" not in name for name in trained) == bool(targets)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(name.endswith("weight") and p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    logits = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(opened(folder), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, logits)
    torch.testing.assert_close(opened(tmp_path / "adapter")(ids).logits, logits)  # finds its base by itself
    with adapted.disable_adapter(), torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, moekit.load(folder)(ids).logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(moekit.load(tmp_path / "merged")(ids).logits, merged(ids).logits)


def test_an_adapter_of_the_latents_is_seen_in_decoding(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    written(tmp_path / "model", latent())
    settings = peft.LoraConfig(r=2, target_modules=["kv_b_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted, ids = peft.get_peft_model(opened(tmp_path / "model"), settings).eval(), random_ids(1, 4)
    with torch.no_grad():
        cache = adapted(input_ids=ids[:, :3], use_cache=True).past_key_values
        ours = adapted(input_ids=ids[:, 3:], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(ours, adapted(input_ids=ids).logits[:, -1])
        with adapted.disable_adapter():
            assert not torch.allclose(ours, adapted(input_ids=ids).logits[:, -1])


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_trl_trains_with_the_balance_loss_in_the_loss_and_logs_it(folder: Path, adapted: bool) -> None:
    trl, peft, datasets = (pytest.importorskip(name) for name in ("trl", "peft", "datasets"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = datasets.Dataset.from_dict({"text": [f"{TEXT} {TEXT[:number]}" for number in range(8)]})
    logs = []
    for coefficient in (None, 0.0):
        settings = trl.SFTConfig(**arguments(folder, max_steps=3, bf16=False, router_aux_loss_coef=coefficient))
        trainer = trl.SFTTrainer(
            opened(folder),
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(**LORA) if adapted else None,
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    with_terms, without = logs
    assert len(with_terms) == 3
    assert all(entry["aux_loss"] > 0 for entry in with_terms)
    assert with_terms[0]["loss"] - without[0]["loss"] == pytest.approx(with_terms[0]["aux_loss"], abs=1e-5)
    assert "aux_loss" not in without[0]


def test_lm_evaluation_harness_scores_a_local_task(folder: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": "one two three", "choices": [" four", " seven"], "answer": 0} for _ in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "numbers.yaml").write_text(
        "task: numbers\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'rows.jsonl'}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    model, tokenizer = opened(folder), transformers.AutoTokenizer.from_pretrained(folder)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(harness, tasks=["numbers"], task_manager=manager, bootstrap_iters=0)
    scores = []
    for choice in rows[0]["choices"]:
        prompt, whole = (tokenizer(text)["input_ids"] for text in ("one two three", "one two three" + choice))
        logs = moekit.load(folder)(torch.tensor([whole])).logits.log_softmax(-1)[0]
        scores.append(sum(logs[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
    assert found["results"]["numbers"]["acc,none"] == float(scores[0] > scores[1])


def test_moekit_alone_does_not_import_transformers() -> None:
    code = "import sys, moekit; moekit.load, moekit.generate; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_encoder_is_refused_in_one_line(tiny_config: Any, tmp_path: Path) -> None:
    moekit.save(moekit.Model(tiny_config(causal=False)), tmp_path / "model")
    with pytest.raises(UnsupportedError, match="MoekitForCausalLM needs a model that predicts the next token"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
