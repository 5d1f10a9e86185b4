"""What has been written comes back to the bit; what is damaged, too much, too little or unknown is one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.errors import CheckpointError, UnsupportedError
from moekit.formats.checkpoint import load
from moekit.formats.directory import check_directory
from moekit.formats.gguf.blocks import BF16, F32
from moekit.formats.gguf.export import save_gguf
from moekit.formats.gguf.file import GGUF, Value, header, padded
from moekit.formats.gguf.restore import import_gguf
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.nn.model import Model

Make = Callable[..., Model]
Change = Callable[[dict[str, Value], dict[str, torch.Tensor]], None]


def rewritten(source: Path, target: Path, change: Change) -> Path:
    """Writes a float32 GGUF file again after a change of its keys and tensors."""
    file = GGUF(source)
    keys = dict(file.keys)
    tensors = {name: file.tensor(name).view(torch.float32).view(info.shape) for name, info in file.tensors.items()}
    change(keys, tensors)
    start, _ = header(keys, [(name, tuple(tensor.shape), F32) for name, tensor in tensors.items()])
    chunks = (tensor.contiguous().numpy().tobytes() for tensor in tensors.values())
    target.write_bytes(start + b"".join(chunk.ljust(padded(len(chunk)), b"\0") for chunk in chunks))
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_model_comes_back_to_the_bit(
    make: Make, parts: dict[str, Any], tokenizer: Tokenizer, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make(parts).to(dtype)
    save_gguf(model, tmp_path / "model.gguf", tokenizer)
    receipt = import_gguf(tmp_path / "model.gguf", tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(again.state_dict()[name], tensor)
    assert load_tokenizer(tmp_path / "model").files() == tokenizer.files()
    check_directory(tmp_path / "model")
    assert receipt["tensors"]["used"].keys() == GGUF(tmp_path / "model.gguf").tensors.keys()
    assert all(check["held"] for check in receipt["checks"])


def test_a_file_without_our_own_key_gives_the_same_model(make: Make, parts: dict[str, Any], tmp_path: Path) -> None:
    model = make(parts)
    save_gguf(model, tmp_path / "model.gguf")
    own = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", lambda keys, _: keys.pop("moekit.config"))
    import_gguf(own, tmp_path / "model")
    ids = torch.randint(300, (1, 90))
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "model")(ids).logits, model(ids).logits)  # magnitudes are rounded


def test_norms_that_bfloat16_would_round_stay_as_they_are(make: Make, tmp_path: Path) -> None:
    model = make("deepseek").bfloat16()
    model.norm.float()
    model.norm.weight.data.fill_(1.001)
    save_gguf(model, tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "model")
    again = load(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert (again["norm.weight"].dtype, again["embed_tokens.weight"].dtype) == (torch.float32, torch.bfloat16)
    receipt = import_gguf(tmp_path / "model.gguf", tmp_path / "half", "bfloat16")
    assert load(tmp_path / "half").norm.weight.dtype == torch.bfloat16
    error = receipt["tensors"]["used"]["output_norm.weight"]["relative_rms"]
    assert 0 < error == receipt["checks"][0]["value"] < BF16.error


def remove(name: str) -> Change:
    return lambda _, tensors: tensors.__delitem__(name)


def put(key: str, value: Value) -> Change:
    return lambda keys, _: keys.__setitem__(key, value)


def own(**values: Any) -> Change:
    def change(keys: dict[str, Value], _: dict[str, torch.Tensor]) -> None:
        keys["moekit.config"] = json.dumps({**json.loads(str(keys["moekit.config"])), **values})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove("blk.1.attn_q.weight"), r"holds \d+ parameters but describes a model of \d+"),
        (lambda _, t: t.__setitem__("alien", torch.zeros(3)), r"holds \d+ parameters but describes a model of \d+"),
        (lambda _, t: t.__setitem__("alien.bias", torch.zeros(3)), "1 tensors without a place .* 'alien.bias'"),
        (lambda _, t: t.__setitem__("x", t.pop("output_norm.weight")), "has no tensor output_norm.weight"),
        (lambda _, t: t.__setitem__("output.weight", t["output.weight"].T), r"shape \(36, 300\) but the settings ask"),
        (lambda _, t: t["blk.0.ffn_up.weight"].fill_(torch.inf), "blk.0.ffn_up.weight .* not finite"),
        (put("general.architecture", "mamba"), "architecture 'mamba' but these are read: deepseek, deepseek2, llama"),
        (put("deepseek.block_count", 2**31), "block_count is 2147483648 but 1 to 512 are allowed"),
        (put("deepseek.expert_used_count", 4), "says 'deepseek.expert_used_count' is 4 where the rest of it means 3"),
        (put("deepseek.attention.sliding_window", 64), "sliding_window' is 64, which would not be computed"),
        (put("deepseek.expert_weights_norm", True), "expert_weights_norm' is True, which would not be computed"),
        (lambda k, _: k.pop("deepseek.rope.freq_base"), "has no key deepseek.rope.freq_base"),
        (own(rms_norm_eps=1e-5), "layer_norm_rms_epsilon' is .* where the rest of it means 1e-05"),
        (own(num_hidden_layers=10**12), "describes no model .* is not a model of 3 layers"),
        (own(alien=1), "describes no model that is known here: .*alien"),
        (put("moekit.config", "[" * 2000), "describes no model that is known here"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    make: Make, tokenizer: Tokenizer, tmp_path: Path, change: Change, reason: str
) -> None:
    save_gguf(make("deepseek"), tmp_path / "model.gguf", tokenizer)
    with pytest.raises((CheckpointError, UnsupportedError), match=reason) as caught:
        import_gguf(rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", change), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("deepseek", put("deepseek.expert_weights_norm", True), "takes weights that are not renormalised and ignores"),
        ("deepseek", put("deepseek.rope.scaling.type", "linear"), "'linear' where the rest of it means 'none'"),
        ("deepseek", put("deepseek.attention.head_count", 0), "describes no model that is known here"),
        ("deepseek", put("deepseek.attention.head_count", [6, 6]), "is \\[6, 6\\], not one int"),
        ("deepseek", lambda k, _: k.pop("deepseek.expert_used_count"), "has no key deepseek.expert_used_count"),
        ("deepseek2", put("deepseek2.expert_gating_func", 3), "describes no model that is known here: .*scoring_func"),
        (
            "deepseek2 groups",
            lambda _, t: [t.pop(f"blk.{layer}.exp_probs_b.bias") for layer in (1, 2)],
            "groups of experts and no selection bias: its groups may be of either kind",
        ),
    ],
)
def test_keys_that_others_may_write_are_computed_or_refused(
    make: Make, name: str, change: Change, reason: str, tmp_path: Path
) -> None:
    def changed(keys: dict[str, Value], tensors: dict[str, torch.Tensor]) -> None:
        keys.pop("moekit.config")
        change(keys, tensors)

    save_gguf(make(name), tmp_path / "model.gguf")
    with pytest.raises((CheckpointError, UnsupportedError), match=reason):
        import_gguf(rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", changed), tmp_path / "model")


def test_keys_that_say_only_what_is_so_anyway_are_read(make: Make, tmp_path: Path) -> None:
    def change(keys: dict[str, Value], _: dict[str, torch.Tensor]) -> None:
        del keys["moekit.config"]
        for key, value in (("expert_weights_norm", False), ("expert_gating_func", 1), ("expert_group_count", 1)):
            keys[f"deepseek.{key}"] = value
        keys["deepseek.feed_forward_length"] = 999  # no layer is dense
        keys["deepseek.rope.scaling.yarn_beta_fast"] = 32.0

    model = make("deepseek tied, all layers MoE")
    save_gguf(model, tmp_path / "model.gguf")
    import_gguf(rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", change), tmp_path / "model")
    assert load(tmp_path / "model").config.ffn == model.config.ffn


def test_a_receipt_beside_the_file_tells_of_any_change(make: Make, tmp_path: Path) -> None:
    save_gguf(make("deepseek"), tmp_path / "model.gguf")
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.gguf has changed since it was written"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "model")


def test_a_directory_that_exists_stays(make: Make, tmp_path: Path) -> None:
    save_gguf(make("llama"), tmp_path / "model.gguf")
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="model exists already"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf cannot be read as GGUF: No such file"):
        import_gguf(tmp_path / "nowhere.gguf", tmp_path / "other")
