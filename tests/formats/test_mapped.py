"""A model whose weights stay in their files is the same model, computes the same, and refuses what it cannot do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekit.config import ModelConfig
from moekit.errors import CheckpointError, UnsupportedError
from moekit.formats.checkpoint import load, save
from moekit.formats.convert import Precision, convert
from moekit.generate import generate
from moekit.nn.cache import KVCache
from moekit.nn.decoder import decoder
from moekit.nn.experts import Experts
from moekit.nn.linear import Linear
from moekit.nn.model import Model
from moekit.nn.router import Probe
from moekit.nn.weights import MappedWeight
from moekit.ops.experts import BACKENDS, choose
from moekit.ops.mapped import Mapped
from moekit.ops.scaled import Scaled

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@pytest.fixture(params=PRECISIONS)
def folder(request: pytest.FixtureRequest, tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = tiny_config(hidden_size=64, attention=heads, ffn={"moe_intermediate_size": 32}, initializer_range=0.1)
    save(Model(config), tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "model", request.param)
    return tmp_path / "model"


def logits(model: Model, ids: Tensor, probe: Probe | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, probe=probe).logits
    return found


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_a_mapped_model_computes_what_the_loaded_one_does(folder: Path, backend: str) -> None:
    loaded, mapped = load(folder), load(folder, mapped=True)
    assert {type(e.gate_up_proj) for e in mapped.modules() if isinstance(e, Experts)} == {MappedWeight}
    try:
        for model in (loaded, mapped):
            model.set_experts_backend(backend)
            logits(model, torch.zeros(1, 1, dtype=torch.int64))
    except UnsupportedError as error:
        pytest.skip(str(error))
    for shape in ((1, 1), (2, 17)):
        ids = torch.randint(loaded.config.vocab_size, shape)
        torch.testing.assert_close(logits(mapped, ids), logits(loaded, ids))  # torch rounds by alignment


def test_a_mapped_model_is_probed_as_the_loaded_one_is(folder: Path) -> None:
    loaded, mapped, ids = load(folder), load(folder, mapped=True), torch.randint(61, (2, 17))
    probe = Probe(skip_top=2, num_experts_per_tok=4, shared=False)
    torch.testing.assert_close(logits(mapped, ids, probe), logits(loaded, ids, probe))
    assert not torch.allclose(logits(mapped, ids, probe), logits(mapped, ids))


def test_a_decoding_step_gives_the_same_logits(folder: Path) -> None:
    ids, found = torch.randint(61, (2, 6)), []
    for mapped in (False, True):
        model = load(folder, mapped=mapped)
        cache = KVCache(model.config, 2, 8)
        step = decoder(model, cache)
        if step is None:
            pytest.skip("no native step on this machine")
        found.append([step.step(ids[:, n], torch.full((2,), n)) for n in range(6)])
    torch.testing.assert_close(*found)


def test_saving_it_writes_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    save(load(folder, mapped=True), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_an_expert_is_read_where_the_file_has_it(folder: Path) -> None:
    """A byte that changes in the file changes the mapped model: nothing was copied."""
    before = load(folder, mapped=True)
    weight = next(module for module in before.modules() if isinstance(module, MappedWeight)).weight
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    assert all(any(a <= at < b for a, b in spans) for at in weight.addresses[..., 0].flatten())


def test_what_a_mapped_model_cannot_do_is_an_error_that_says_why(folder: Path) -> None:
    model = load(folder, mapped=True)
    with pytest.raises(UnsupportedError, match="for inference"):
        model.train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    x = torch.randn(3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(UnsupportedError, match="mapped weights are for inference and have no gradients"):
        experts(x, torch.tensor([3] + [0] * (experts.gate_up_proj.weight.shape[0] - 1)))


def test_to_another_dtype_leaves_the_experts_in_their_file(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16, mapped=True)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    weight = next(module for module in model.modules() if isinstance(module, MappedWeight)).weight
    assert isinstance(weight, Mapped)
    model.to(torch.bfloat16)
    ids = torch.randint(61, (1, 9))
    exact = logits(load(folder), ids).float()
    assert float((logits(model, ids).float() - exact).norm() / exact.norm()) < 0.05


def test_a_hole_or_another_shape_in_the_file_is_found_without_reading_it(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    save(Model(tiny_config()), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"moe_intermediate_size": 10', '"moe_intermediate_size": 6'))
    with pytest.raises(CheckpointError, match=r"experts.0.gate_proj.weight in .* has shape"):
        load(tmp_path / "model", check_hashes=False, mapped=True)


def test_auto_takes_the_native_kernels_for_mapped_experts(folder: Path) -> None:
    model = load(folder, mapped=True)
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    gate_up, down = experts.gate_up_proj.weight, experts.down_proj.weight
    x = torch.zeros(1, model.config.hidden_size)
    wanted = "torch" if BACKENDS["native"].unavailable(x, gate_up, down) else "native"
    assert choose("auto", x, gate_up, down) == wanted


# 8-bit floating point


def test_in_8_bits_all_matrices_stay_in_the_file_but_those_that_decoding_absorbs(fp8: Path) -> None:
    model = load(fp8, mapped=True)
    kept = {name: module.matrix for name, module in model.named_modules() if isinstance(module, Linear)}
    numbers = {name for name, matrix in kept.items() if isinstance(matrix, Tensor)}
    assert numbers == {"lm_head", "layers.0.self_attn.kv_b_proj", "layers.1.self_attn.kv_b_proj"}
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    assert all(isinstance(weight, Mapped) and isinstance(weight.one, Scaled) for weight in experts.stacked)
    assert not any("experts." in name for name in model.state_dict())


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_in_8_bits_it_computes_what_the_loaded_one_does_to_the_bit(
    fp8: Path, backend: str, dtype: torch.dtype | None
) -> None:
    """With the same back end; `auto` takes another one for experts that are loaded, whose rounding is its own.

    Against the numbers in float64 relative differences of 0.010 and 3.2e-7 were seen.
    """
    loaded, mapped = load(fp8, dtype=dtype), load(fp8, dtype=dtype, mapped=True)
    ids = torch.randint(loaded.config.vocab_size, (2, 17))
    exact = logits(load(fp8, dtype=torch.float64), ids)
    near = (logits(mapped, ids) - exact).norm() / exact.norm()
    assert near < (0.03 if dtype is None else 2e-6)
    for model in (loaded, mapped):
        model.set_experts_backend(backend)
    assert torch.equal(logits(mapped, ids), logits(loaded, ids))
    assert torch.equal(*(generate(model, ids, max_new_tokens=5) for model in (loaded, mapped)))


def test_numbers_may_stand_beside_8_bits(fp8: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    for key in ("mlp.experts.3.up_proj.weight", "mlp.experts.0.gate_proj.weight", "self_attn.o_proj.weight"):
        del tensors[f"model.layers.1.{key}_scale_inv"]
        tensors[f"model.layers.1.{key}"] = tensors[f"model.layers.1.{key}"].bfloat16() / 1000
    save_file(tensors, fp8 / "model.safetensors")
    loaded, mapped = load(fp8), load(fp8, mapped=True)
    loaded.set_experts_backend("torch")
    assert torch.equal(*(logits(model, torch.arange(40).view(2, 20)) for model in (loaded, mapped)))


def test_the_native_kernels_say_that_they_do_not_read_8_bit_floating_point(fp8: Path) -> None:
    model = load(fp8, mapped=True)
    with pytest.raises(UnsupportedError) as caught:
        model.set_experts_backend("native")
    said = "rows are torch.bfloat16 and weights torch.float8_e4m3fn; it takes float32, or bfloat16 rows with either"
    assert str(caught.value).startswith(f"backend is 'native', which cannot run here: {said}")
    assert "\n" not in str(caught.value)
    assert decoder(model, KVCache(model.config, 1, 8)) is None


def test_in_8_bits_saving_writes_the_numbers_of_the_loaded_one(fp8: Path, tmp_path: Path) -> None:
    for name, mapped in (("one", True), ("other", False)):
        save(load(fp8, mapped=mapped), tmp_path / name)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_copy_reads_its_own_memory(folder: Path, tmp_path: Path) -> None:
    model, ids = load(folder, mapped=True), torch.randint(61, (1, 9))
    before = logits(model, ids)

    def places(of: Model) -> set[int]:
        stacks = [module.weight for module in of.modules() if isinstance(module, MappedWeight)]
        readable = [stack for stack in stacks if isinstance(stack, Mapped) and not isinstance(stack.one, Scaled)]
        return {int(address) for stack in readable for address in stack.addresses[:, :, 0].flatten()}

    first = places(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert not places(other) & first
        assert torch.equal(logits(other, ids), before)
    assert places(model) == first


@pytest.mark.parametrize("kept", [torch.float16, torch.float64])
def test_mapped_experts_of_a_dtype_that_the_native_step_does_not_read(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path, kept: torch.dtype
) -> None:
    save(Model(tiny_config()).to(kept), tmp_path / "model")
    mapped = load(tmp_path / "model", dtype=torch.float32, mapped=True)
    loaded = load(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([[3, 1, 4]])
    assert torch.equal(generate(mapped, ids, max_new_tokens=6), generate(loaded, ids, max_new_tokens=6))
