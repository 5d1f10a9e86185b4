"""YAML files, dotted overrides, and the one line that says what is wrong with them."""

from pathlib import Path

import pytest

from moekit.config import (
    AdamWConfig,
    DataConfig,
    DenseConfig,
    MuonConfig,
    RunConfig,
    describe_keys,
    dump,
    load_model_config,
    load_run_config,
    preset,
    recipe,
)
from moekit.errors import ConfigError

DATA = {"data.path": "data"}


def _file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _said(source: str | Path, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_run_config(source, overrides, **DATA)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_preset_is_a_run_once_it_has_data() -> None:
    run = load_run_config("tiny-deepseekmoe", **DATA)
    assert run.model == preset("tiny-deepseekmoe")
    assert (run.steps, run.optimizer.lr, run.schedule.warmup_steps, run.data.batch_size) == (300, 3e-3, 30, 16)
    with pytest.raises(
        ConfigError,
        match=r"^data.path is missing: directory written by `moekit prepare`, or files of sentences; --data",
    ):
        load_run_config("tiny-deepseekmoe")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", "+1e-3", ".001"])
def test_every_spelling_of_a_float_is_a_float(text: str) -> None:
    assert load_run_config("tiny-dense", {"optimizer.lr": text}, **DATA).optimizer.lr == 0.001


def test_override_values_are_yaml() -> None:
    overrides = {
        "model.ffn.n_routed_experts": "31",
        "model.ffn.norm_topk_prob": "true",
        "model.attention.rope": "{theta: 5e+5}",
        "grad_clip": "null",
        "device": "cuda:1",
        "optimizer.weight_decay": "0",
    }
    run = load_run_config("tiny-deepseekmoe", overrides, **DATA)
    assert run.model.ffn.model_dump()["n_routed_experts"] == 31
    assert run.model.ffn.model_dump()["norm_topk_prob"] is True
    assert run.model.attention.rope.theta == 5e5
    assert (run.grad_clip, run.device, run.optimizer.weight_decay) == (None, "cuda:1", 0.0)


def test_a_changed_kind_replaces_a_part_of_the_model_and_an_unchanged_one_does_not() -> None:
    dense = load_run_config(
        "tiny-deepseekmoe", {"model.ffn.intermediate_size": "64", "model.ffn.kind": "dense"}, **DATA
    )
    assert dense.model.ffn == DenseConfig(intermediate_size=64)
    same = load_run_config("tiny-deepseekmoe", {"model.ffn.kind": "moe"}, **DATA)
    assert same.model == preset("tiny-deepseekmoe")


def test_another_optimizer_or_schedule_keeps_the_settings_that_it_shares(tmp_path: Path) -> None:
    run = load_run_config("tiny-deepseekmoe", {"optimizer.kind": "muon", "schedule.kind": "cosine"}, **DATA)
    assert run.optimizer == MuonConfig(lr=3e-3)
    assert run.schedule.model_dump() == {"kind": "cosine", "warmup_steps": 30, "final_ratio": 0.1}
    text = (
        "preset: tiny-gshard\noptimizer: {kind: muon, momentum: 0.5, beta2: 0.9, eps: 1e-7}\n"
        "schedule: {kind: wsd, final_ratio: 0.2, decay_fraction: 0.5}"
    )
    back = {"optimizer.kind": "adamw", "schedule": "{kind: cosine, warmup_steps: 7}"}
    run = load_run_config(_file(tmp_path, text), back, **DATA)
    assert run.optimizer == AdamWConfig(lr=3e-3, beta2=0.9, eps=1e-7)
    assert run.schedule.model_dump() == {"kind": "cosine", "warmup_steps": 7, "final_ratio": 0.2}
    back["optimizer.momentum"] = "0.9"
    assert "momentum is a setting of optimizer.kind muon only" in _said(_file(tmp_path, text), back)
    for kind in ("mon", "null", "[muon]"):
        assert "allowed: adamw, muon" in _said("tiny-gshard", {"optimizer.kind": kind})


def test_a_template_fills_in_the_data_that_nothing_names(tmp_path: Path) -> None:
    assert load_run_config("tiny-dense", template=True).data == DataConfig(path="DATA", **recipe("tiny-dense")["data"])
    named = _file(tmp_path, "preset: tiny-dense\ndata: {path: there}")
    assert load_run_config(named, template=True).data.path == "there"
    assert load_run_config(named, {"data.path": "here"}, template=True).data.path == "here"


def test_a_file_may_start_from_a_preset(tmp_path: Path) -> None:
    whole = load_run_config(
        _file(tmp_path, "preset: tiny-gshard\nmodel: {hidden_size: 48}\ndata: {path: there}\nsteps: 70")
    )
    assert whole.model == preset("tiny-gshard").model_copy(update={"hidden_size": 48})
    assert whole.steps == 70
    assert whole.data == DataConfig(path="there", **recipe("tiny-gshard")["data"])
    only = load_run_config(_file(tmp_path, "model: {preset: mini-dense}\nsteps: 70"), **DATA)
    assert (only.model, only.optimizer.lr) == (preset("mini-dense"), 1e-3)
    assert load_model_config(_file(tmp_path, "preset: tiny-hash")) == preset("tiny-hash")


def test_parts_of_a_file_may_leave_their_usual_kind_out(tmp_path: Path) -> None:
    text = "model: {preset: tiny-dense}\nsteps: 70\noptimizer: {lr: 1e-4}\nschedule: {warmup_steps: 3}"
    run = load_run_config(_file(tmp_path, text), {"optimizer.kind": "adamw", "schedule.factor": "0.5"}, **DATA)
    assert (run.optimizer.lr, run.schedule.warmup_steps) == (1e-4, 3)
    assert run.schedule.model_dump()["factor"] == 0.5


@pytest.mark.parametrize(
    "path", ["1e-3", "8", "true", "null", "a: b", "# x", "line\nbreak", "ü\x85\u2028", "'\"", "...", ""]
)
def test_a_dumped_file_loads_to_the_same_run(path: str, tmp_path: Path) -> None:
    run = load_run_config("deepseek-v3", **{"data.path": path, "optimizer.lr": 1e-30})
    for comments in (False, True):
        assert load_run_config(_file(tmp_path, dump(run, comments))) == run


def test_comments_describe_every_setting() -> None:
    lines = dump(load_run_config("tiny-deepseekmoe", **DATA), comments=True).splitlines()
    assert all("  # " in line for line in lines)
    assert any(line.startswith("    n_routed_experts: 63") and "routed experts" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "run.yaml is empty"),
        ("- a\n- b", "run.yaml is a list"),
        ("a: 1\nb: [1", "run.yaml:2: "),
        ("steps: 1\nseed: 2\nsteps: 3", "run.yaml:3: key 'steps' is given twice"),
        ("model:\n  a: 1\n  a: 2", "run.yaml:3: key 'a' is given twice"),
        ("a: \x01", "run.yaml: "),
        ("preset: tiny-gshrd", 'run.yaml: preset is "tiny-gshrd", which is none (did you mean tiny-gshard?)'),
        ("preset: [tiny-dense]", 'run.yaml: preset is ["tiny-dense"] but must be the name of a preset'),
        ("model: {preset: 3}", "run.yaml: model.preset is 3 but must be the name of a preset"),
        ("preset: tiny-dense\nmodel: 3", "run.yaml: model is 3 but must be a mapping of settings"),
        ("preset: tiny-dense\n3: 4", "run.yaml: 3 is not a setting"),
    ],
)
def test_a_broken_file_is_named_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    assert said in _said(_file(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "no.yaml cannot be read: No such file" in _said(tmp_path / "no.yaml")
    assert "cannot be read: Is a directory" in _said(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"device: caf\xe9")
    assert "latin.yaml: 'utf-8' codec can't decode byte 0xe9" in _said(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.hidden_size", '"8"', 'model.hidden_size is "8" but must be a valid integer'),
        ("model.hidden_size", "true", "model.hidden_size is true but must be a valid integer"),
        ("model.hidden_size", "8.0", "model.hidden_size is 8.0 but must be a valid integer"),
        ("model.hidden_size", "0", "model.hidden_size is 0 but must be greater than 0"),
        ("model.rms_norm_eps", "true", "model.rms_norm_eps is true but must be a valid number"),
        ("recompute", "1", "recompute is 1 but must be a valid boolean"),
        ("device", "3", "device is 3 but must be a valid string"),
        ("precision", "float16", 'precision is "float16" (did you mean bfloat16?); allowed: auto, float32, bfloat16'),
        ("model.ffn.kind", "mo", 'model.ffn.kind is "mo" (did you mean moe?); allowed: dense, moe'),
        ("model.ffn", "3", "model.ffn is 3 but must be a mapping of settings"),
        ("model.attention.rope", "null", "model.attention.rope is null but must be a mapping of settings"),
        ("model.ffn.n_routed_expert", "8", "n_routed_expert is not a setting (did you mean n_routed_experts?)"),
        ("n_routed_experts", "8", "n_routed_experts is not a setting; n_routed_experts is model.ffn.n_routed_experts"),
        ("model.attention.kv_lora_rank", "8", "kv_lora_rank is a setting of model.attention.kind mla only"),
        ("model.ffn.kind", "dense", "model.ffn.intermediate_size is missing: intermediate width (int)"),
        ("data.sequence_length", "512", "data.sequence_length is 512 but model.max_position_embeddings is 256"),
        ("data.micro_batch_size", "5", "data.micro_batch_size is 5 but must divide batch_size, 16"),
        ("schedule.warmup_steps", "301", "schedule.warmup_steps is 301 but must be at most steps, which is 300"),
        ("steps", "[1", "--steps is '[1', which is not a YAML value"),
        ("seed", str(10**20), "seed is 100000000000000000000 but must be less than 9223372036854775808"),
    ],
)
def test_one_line_says_what_was_found_and_what_is_allowed(key: str, value: str, said: str) -> None:
    assert said in _said("tiny-deepseekmoe", {key: value})


def test_muon_without_experts_is_refused() -> None:
    said = _said("tiny-dense", {"optimizer.kind": "muon"})
    assert "optimizer.kind is muon but model.ffn.kind is dense" in said


def test_one_for_a_float_is_fine() -> None:
    assert load_run_config("tiny-dense", {"optimizer.eps": "1"}, **DATA).optimizer.eps == 1.0


def test_several_errors_are_counted_and_the_unknown_key_comes_first(tmp_path: Path) -> None:
    text = "model: {preset: tiny-dense}\nstep: 3\nseed: -1"
    said = _said(_file(tmp_path, text))
    assert "step is not a setting (did you mean steps?)" in said
    assert said.endswith("(and 2 more)")


def test_overrides_that_contradict_each_other_are_refused() -> None:
    assert "give one of them" in _said("tiny-dense", {"model.ffn": "3", "model.ffn.kind": "moe"})
    assert "give one of them" in _said("tiny-dense", {"model.ffn.kind": "moe", "model.ffn": "null"})


def test_a_model_takes_overrides_of_the_model_only() -> None:
    assert load_model_config("tiny-dense", {"model.hidden_size": "48"}).hidden_size == 48
    with pytest.raises(ConfigError, match=r"--steps is no setting of a model; overrides here begin with --model\."):
        load_model_config("tiny-dense", {"steps": "3"})


def test_a_misspelt_name_gets_the_nearest_preset() -> None:
    assert "no preset or file 'tiny-deepseekmo' (did you mean tiny-deepseekmoe?)" in _said("tiny-deepseekmo")


def test_described_keys_are_all_the_keys_of_a_dumped_run() -> None:
    def leaves(tree: dict[str, object], prefix: str = "") -> set[str]:
        found = set()
        for key, value in tree.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
        return found

    described = {key.key for key in describe_keys()}
    for name in ("tiny-dense", "deepseek-v3"):
        assert leaves(load_run_config(name, **DATA).model_dump()) <= described
    assert all(key.description and key.type and key.default for key in describe_keys())
    assert {key.partition(".")[0] for key in described} == set(RunConfig.model_fields)
