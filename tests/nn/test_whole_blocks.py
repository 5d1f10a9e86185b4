"""A block in one call of our kernels: what its modules give one by one, wherever that may be."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moekit.config import MHAConfig, ModelConfig, MoEConfig
from moekit.formats.checkpoint import load, save
from moekit.nn import block as blocks
from moekit.nn.cache import KVCache
from moekit.nn.decoder import decoder
from moekit.nn.ffn import SwiGLU
from moekit.nn.model import Model, ModelOutput
from moekit.nn.norm import RMSNorm
from moekit.nn.quantized import quantize_
from moekit.nn.router import Probe
from moekit.ops.kernels import block, build
from moekit.ops.kernels import linear as kernels

HEADS = {"num_attention_heads": 3, "kv_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "latent": {"attention": {"kind": "mla", **HEADS}},
    "latent, compressed queries": {"attention": {"kind": "mla", "q_lora_rank": 24, **HEADS}},
    "no shared expert": {"ffn": {"n_shared_experts": 0}},
    "V3's router": {"ffn": V3},
    "dense": {"ffn": {"kind": "dense"}},
}
LENGTH = 37


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets our kernels take float32 on any machine."""
    if build.native().library is None:
        pytest.skip("there are no native kernels")
    monkeypatch.setattr(kernels, "native", lambda: build.native()._replace(wide_amd=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the blocks that are one call."""
    made: list[int] = []

    def counting(name: str, several: bool) -> None:
        before = getattr(blocks, name)

        def counted(x: Tensor, delta: Tensor | None, of: Any, low: torch.dtype) -> Any:
            made.extend([1] * (len(of) if several else 1))
            return before(x, delta, of, low)

        monkeypatch.setattr(blocks, name, counted)

    counting("whole_blocks", several=True)
    counting("learning_block", several=False)
    return made


@pytest.fixture
def made(tiny_config: Callable[..., ModelConfig]) -> Callable[..., Model]:
    """Makes a model of a dense block and two more."""

    def make(name: str, dtype: str = "float32") -> Model:
        if dtype == "bfloat16" and not (build.native().bfloat16 and not build.native().amx):
            pytest.skip("torch multiplies bfloat16 on this machine")
        settings = MODELS[name]
        ffn = {"first_k_dense_replace": 1, "intermediate_size": 70} | settings.get("ffn", {})
        if ffn.get("kind") == "dense":
            del ffn["first_k_dense_replace"]
        config = tiny_config(**settings | {"ffn": ffn}, num_hidden_layers=3, hidden_size=64, initializer_range=0.2)
        model = Model(config).eval()
        for key, parameter in model.named_parameters():
            if "norm" in key:
                nn.init.normal_(parameter, mean=1.0, std=0.2)
        for layer in model.moe_layers:
            if layer.router.expert_bias is not None:
                layer.router.expert_bias.normal_(std=0.3)
        return model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)

    return make


def drawn(model: Model) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, LENGTH))


def apart(model: Model) -> Model:
    """Returns the model with hooks that nobody may pass over, so that each part of it is called."""
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda *_: None)
    return model


def same(ours: ModelOutput, theirs: ModelOutput, bound: float) -> None:
    assert ours.logits is not None
    assert theirs.logits is not None
    assert ours.logits.dtype == theirs.logits.dtype
    assert (ours.logits - theirs.logits).abs().max() <= bound * theirs.logits.abs().max()
    assert ours.routing is not None
    assert theirs.routing is not None
    for one, other in zip(ours.routing, theirs.routing, strict=True):
        assert torch.equal(one.expert_ids, other.expert_ids)
        for name, a, b in zip(one._fields, one, other, strict=True):
            assert a is not None, name
            assert b is not None, name
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert (a.double() - b.double()).abs().max() <= bound * b.double().abs().max(), name


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "into a cache"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_its_modules_one_by_one(
    name: str, dtype: str, cached: bool, calls: list[int], made: Callable[..., Model]
) -> None:
    model = made(name, dtype)
    ids = drawn(model)
    if dtype.startswith("int"):
        quantize_(model, dtype)  # type: ignore[arg-type]
    found, caches = [], []
    for turn in range(2):
        caches.append(KVCache(model.config, 2, LENGTH + 1) if cached else None)
        found.append((model if turn == 0 else apart(model))(ids, cache=caches[-1], return_routing=True))
    mixes = name.startswith("latent") and dtype.startswith("int")  # kv_b_proj stays in numbers, the others are codes
    assert len(calls) == (0 if mixes else 3)
    same(*found, bound=2e-2 if dtype == "bfloat16" else 2e-5)
    if cached:
        for layer in range(3):
            kept = [cache.layer(layer)[:, :LENGTH] for cache in caches if cache is not None]
            torch.testing.assert_close(kept[0], kept[1], rtol=2e-2, atol=2e-2 if dtype == "bfloat16" else 1e-4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for each call of the library that computes blocks, and how many those are."""
    made: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(build.library(), name)

        def moekit_blocks(self, *arguments: Any) -> None:
            made.append(arguments[2])
            build.library().moekit_blocks(*arguments)

    monkeypatch.setattr(block, "library", Counting)
    return made


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_blocks_in_one_call_are_those_of_several_to_the_bit(
    name: str, asked: list[int], calls: list[int], made: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = made(name), []
    ids, each = drawn(model), list[int]()
    work = block.Whole.work
    monkeypatch.setattr(block.Whole, "work", lambda *of: each.append(work(*of)) or each[-1])
    found.append(model(ids, return_routing=True))
    for together in (each[0] + 1, 0):
        monkeypatch.setattr(block, "TOGETHER", together)
        found.append(model(ids, return_routing=True))
    assert asked == [3, 2, 1, 1, 1, 1]
    model.layers[1].register_forward_hook(lambda *_: None)  # who hooks a block sees each
    found.append(model(ids, return_routing=True))
    assert asked[6:] == [1, 1, 1]
    assert len(calls) == 4 * 3
    for other in found[1:]:
        same(found[0], other, 0.0)


@torch.no_grad()
def test_the_work_of_a_block_is_that_of_its_products(made: Callable[..., Model]) -> None:
    model, found = made("plain"), []
    with pytest.MonkeyPatch.context() as patch:
        work = block.Whole.work
        patch.setattr(block.Whole, "work", lambda *of: found.append(work(*of)) or 0)
        model(drawn(model))
    config, dim, tokens = model.config, 64, 2 * LENGTH
    attention, ffn = config.attention, config.ffn
    assert isinstance(attention, MHAConfig)
    assert isinstance(ffn, MoEConfig)
    heads, kv_heads, width = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
    attending = dim * width * (2 * heads + 2 * kv_heads) + LENGTH * heads * 2 * width
    experts = 3 * dim * (ffn.shared_width + ffn.num_experts_per_tok * ffn.moe_intermediate_size)
    assert found == [tokens * (attending + 3 * dim * 70), *[tokens * (attending + experts)] * 2]


@torch.no_grad()
def test_experts_in_files_are_waited_for_a_block_at_a_time(
    asked: list[int], made: Callable[..., Model], tmp_path: Path
) -> None:
    model = made("plain")
    ids = drawn(model)
    expected = model(ids, return_routing=True)
    save(model, tmp_path / "model")
    mapped = load(tmp_path / "model", mapped=True).eval()
    same(expected, mapped(ids, return_routing=True), 1e-6)
    assert asked == [3, 2, 1], "the dense block and the first of experts; the second"


@torch.no_grad()
def test_a_model_without_blocks_is_its_embedding_and_its_head(made: Callable[..., Model]) -> None:
    model = made("plain")
    model.layers = nn.ModuleList()
    ids = drawn(model)
    assert torch.equal(model(ids).hidden, model.norm(model.embed_tokens(ids)))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_stream_of_another_dtype_goes_module_by_module_under_autocast(
    dtype: torch.dtype, learns: bool, calls: list[int], learning: Callable[..., Model]
) -> None:
    model = learning("plain", "mixed")
    ids = drawn(model)
    model.embed_tokens.to(dtype)
    with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16):
        ours = model(ids, return_routing=True)
        assert len(calls) == (2 if dtype == torch.float16 else 0), "float16 and bfloat16 make a stream in float32"
        same(ours, apart(model)(ids, return_routing=True), 2e-2)


@torch.no_grad()
def test_documents_and_a_loss_are_as_they_were(calls: list[int], made: Callable[..., Model]) -> None:
    model = made("plain")
    ids = drawn(model)
    documents = torch.tensor([[0] * 20 + [1] * 17, [3] * 5 + [1] * 32])
    ours = model(ids, labels=ids, document_ids=documents, return_routing=True)
    assert len(calls) == 3
    theirs = apart(model)(ids, labels=ids, document_ids=documents, return_routing=True)
    same(ours, theirs, 2e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)
    for name, term in ours.aux.items():
        torch.testing.assert_close(term, theirs.aux[name])


@torch.no_grad()
def test_the_stream_is_left_as_it_was(calls: list[int], made: Callable[..., Model]) -> None:
    """A block writes into memory of its own, whether something is added to its input or not."""
    model, seen = made("plain"), []
    for layer in model.layers:
        layer.register_forward_pre_hook(
            lambda _, args: seen.append([(t, t.clone()) for t in args[:2] if t is not None])
        )
    model(drawn(model))
    assert len(calls) == 3
    assert [len(pair) for pair in seen] == [1, 2, 2]
    assert all(torch.equal(now, before) for pair in seen for now, before in pair)


TOUCHED: dict[str, Callable[[Model], Any]] = {
    "a norm": lambda model: model.layers[1].post_attention_layernorm,
    "attention": lambda model: model.layers[1].self_attn,
    "a projection": lambda model: model.layers[1].self_attn.k_proj,
    "the feed-forward network": lambda model: model.layers[1].mlp,
    "the router": lambda model: model.layers[1].mlp.router,
    "the experts": lambda model: model.layers[1].mlp.experts,
    "the shared experts": lambda model: model.layers[1].mlp.shared_experts,
}


@pytest.mark.parametrize("part", TOUCHED)
@torch.no_grad()
def test_what_is_hooked_is_called(part: str, calls: list[int], made: Callable[..., Model]) -> None:
    model, called = made("plain"), []
    TOUCHED[part](model).register_forward_hook(lambda *_: called.append(1))
    model(drawn(model))
    assert len(called) == 1
    assert len(calls) == 2, "the other blocks are one call"


ELSEWHERE: dict[str, Callable[[Model], nn.Module]] = {
    **{part: of for part, of in TOUCHED.items() if part != "attention"},
    "the head": lambda model: model.lm_head,
    "the last norm": lambda model: model.norm,
}


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("part", ELSEWHERE)
def test_what_is_on_another_device_is_not_read(part: str, learns: bool, made: Callable[..., Model]) -> None:
    """Reading it would end the process. meta stands for any other device, though torch does not always refuse it."""
    model = made("V3's router")
    ELSEWHERE[part](model).to("meta")
    assert decoder(model, KVCache(model.config, 2, 4)) is None
    with torch.set_grad_enabled(learns), contextlib.suppress(RuntimeError, NotImplementedError):
        model(drawn(model))


class Doubled(Tensor):
    """Numbers that are not those that lie in its memory, as in a tensor of another library's codes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return 2 * func(args[0], args[1].as_subclass(Tensor))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("learns", [False, True])
def test_a_weight_of_a_class_of_its_own_multiplies_itself(learns: bool, made: Callable[..., Model]) -> None:
    model = made("plain")
    linear, ids, found = model.layers[1].self_attn.o_proj, drawn(model), []
    plain = linear.weight.detach()
    for weight in (plain.as_subclass(Doubled), 2 * plain):
        linear.weight = nn.Parameter(weight)
        cache = KVCache(model.config, 2, 4)
        with torch.set_grad_enabled(learns):
            found.append(model(ids).logits)
        with torch.no_grad():
            step = decoder(model, cache)
            first = step.step(ids[:, 0], cache.lengths) if step else model(ids[:, :1], cache=cache).logits[:, 0]
        assert (first - found[-1][:, 0]).abs().max() < 1e-5 * first.abs().max()
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[1].abs().max()


def test_a_block_without_numbers_has_its_shapes() -> None:
    with FakeTensorMode():
        module, norm, x = SwiGLU(12, 7), RMSNorm(12, 1e-6), torch.zeros(3, 12)
        module(norm(x)).sum().backward()
        with torch.no_grad():
            assert module(norm(x)).shape == (3, 12)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


def test_probes_padding_and_float16_go_module_by_module(calls: list[int], made: Callable[..., Model]) -> None:
    model = made("plain")
    ids = drawn(model)
    for learns in (False, True):
        with torch.set_grad_enabled(learns):
            model(ids, probe=Probe(skip_top=1))
            model(ids, padding_mask=torch.arange(LENGTH).expand(2, -1) < 30)
            with torch.autocast("cpu", torch.float16):
                model(ids)
    assert len(calls) == 4, "the dense block of the first two, which neither concerns"


KINDS = ["float32", "bfloat16", "mixed"]
"""Of a training step: mixed is bfloat16 products beside float32 weights."""
BOUND = {"float32": 1e-5, "bfloat16": 3e-2, "mixed": 2e-2}


def step(model: Model, kind: str, more: Callable[[ModelOutput], Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the loss, what else is summed, and every gradient of a step on the same tokens."""
    model.train().zero_grad()
    torch.manual_seed(1)
    ids = drawn(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "mixed"):
        output = model(ids, labels=ids, return_routing=True)
    assert output.loss is not None
    objective = output.loss + sum(output.aux.values())
    if more is not None:
        objective = objective + more(output)
    objective.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "objective": objective.detach()} | gradients


def near(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    """Asserts that all are equal but for a share of each one's own size."""
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        assert (one.dtype, one.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert (one.double() - theirs[name].double()).norm() <= bound * theirs[name].double().norm(), name


BALANCED = {"aux_loss_alpha": 0.3, "z_loss_alpha": 0.1}


@pytest.fixture
def learning(made: Callable[..., Model]) -> Callable[..., Model]:
    """Makes a model whose balance losses count, in float32 or in bfloat16."""

    def make(name: str, kind: str = "float32") -> Model:
        if kind != "float32" and not (build.native().bfloat16 and not build.native().amx):
            pytest.skip("torch multiplies bfloat16 on this machine")
        model = made(name, "bfloat16" if kind == "bfloat16" else "float32")
        for layer in model.moe_layers:
            layer.config = layer.config.model_copy(update=BALANCED)
        return model

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_is_its_modules_one_by_one(
    name: str, kind: str, calls: list[int], learning: Callable[..., Model]
) -> None:
    model = learning(name, kind)
    ours = step(model, kind)
    assert len(calls) == 3
    theirs = step(apart(model), kind)
    assert len(calls) == 3
    assert len(ours) == 2 + len(list(model.parameters()))
    near(ours, theirs, BOUND[kind])


def test_what_is_read_of_the_routing_has_its_gradient(calls: list[int], learning: Callable[..., Model]) -> None:
    def more(output: ModelOutput) -> Tensor:
        assert output.routing is not None
        total = torch.zeros(())
        for number, one in enumerate(output.routing):
            assert one.scores is not None
            assert one.score_sums is not None
            assert one.squared_lse_sums is not None
            parts = one.weights.square().sum(), one.scores.pow(3).sum(), one.score_sums.square().sum()
            total = total + (number + 1) * sum(parts, one.squared_lse_sums.sum() / 10) / 20
        return total

    for name in ("plain", "V3's router"):
        model = learning(name)
        ours = step(model, "float32", more)
        near(ours, step(apart(model), "float32", more), 1e-5)
        assert (ours["layers.1.mlp.router.weight"] - step(model, "float32")["layers.1.mlp.router.weight"]).norm() > 0.1
    assert len(calls) == 6


FROZEN: dict[str, Callable[[str], bool]] = {
    "all but the experts": lambda name: ".experts." in name,
    "all but a router": lambda name: name == "layers.1.mlp.router.weight",
    "the embedding": lambda name: "embed" not in name,
    "the first block": lambda name: not name.startswith(("embed", "layers.0")),
    "all but a norm": lambda name: name == "layers.0.input_layernorm.weight",
    "all but attention's last": lambda name: name == "layers.2.self_attn.o_proj.weight",
}


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize("name", ["plain", "latent"])
def test_what_is_frozen_gets_no_gradient(
    name: str, which: str, calls: list[int], learning: Callable[..., Model]
) -> None:
    model = learning(name)
    every = step(model, "float32")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(FROZEN[which](key))
    ours = step(model, "float32")
    assert len(calls) == 6
    assert {key for key in ours if "." in key} == {key for key in every if "." in key and FROZEN[which](key)}
    for key in ours:
        assert torch.equal(ours[key], every[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_twice_and_with_its_blocks_recomputed(
    kind: str, calls: list[int], learning: Callable[..., Model]
) -> None:
    model = learning("latent, compressed queries", kind)
    first = step(model, kind)
    model.recompute = True
    for again in (step(model, kind), step(model, kind)):
        assert all(torch.equal(one, again[key]) for key, one in first.items())
    assert len(calls) == 3 + 2 * 6


def test_a_way_back_can_be_gone_twice(calls: list[int], learning: Callable[..., Model]) -> None:
    model = learning("plain").train()
    ids = drawn(model)
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for parameter, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)
    assert len(calls) == 3


def test_one_output_alone_has_a_way_back(calls: list[int], learning: Callable[..., Model]) -> None:
    """Of the stream or of what is to be added to it; the gradients of both are those of their sum."""
    model = learning("plain").train()
    ids = drawn(model)
    seen: list[tuple[Tensor, Tensor]] = []
    model.layers[1].register_forward_hook(lambda _, args, output: seen.append(output[:2]))
    model(ids)
    stream, delta = seen[0]
    weights = [model.layers[0].self_attn.q_proj.weight, model.layers[1].mlp.experts.down_proj]
    toward = torch.randn_like(stream)
    parts = [
        torch.autograd.grad((part * toward).sum(), weights, retain_graph=True, allow_unused=True)
        for part in (stream, delta, stream + delta)
    ]
    sums = {str(number): alone + other for number, (alone, other, _) in enumerate(zip(*parts, strict=True))}
    near(sums, {str(number): both for number, both in enumerate(parts[2])}, 1e-5)
    assert not parts[0][1].any(), "the experts add nothing to the stream itself"
    assert len(calls) == 3


@pytest.mark.parametrize("part", TOUCHED)
def test_what_is_hooked_is_called_in_training(part: str, calls: list[int], learning: Callable[..., Model]) -> None:
    model, called = learning("plain"), []
    ours = step(model, "float32")
    TOUCHED[part](model).register_full_backward_hook(lambda *_: called.append(1))
    theirs = step(model, "float32")
    assert (len(called), len(calls)) == (1, 5)
    near(ours, theirs, 1e-5)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("part", TOUCHED)
def test_what_stands_in_a_classs_place_is_called(
    part: str, learns: bool, learning: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, called = learning("plain"), []
    kind = type(TOUCHED[part](model))
    before = kind.forward

    def patched(*given: Any, **named: Any) -> Any:
        called.append(1)
        return before(*given, **named)

    monkeypatch.setattr(kind, "forward", patched)
    with torch.set_grad_enabled(learns):
        model(drawn(model))
    assert len(called) >= sum(type(module) is kind for module in model.modules())
    assert decoder(model, KVCache(model.config, 2, 4)) is None


def test_evaluation_under_autocast_is_one_call_too(calls: list[int], learning: Callable[..., Model]) -> None:
    model = learning("latent", "mixed")
    ids = drawn(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = model(ids, return_routing=True)
        assert len(calls) == 3
        same(ours, apart(model)(ids, return_routing=True), 2e-2)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("learns", [False, True])
def test_torchs_default_dtype_changes_nothing(
    default: torch.dtype, learns: bool, calls: list[int], made: Callable[..., Model]
) -> None:
    model = made("V3's router")
    ids, found = drawn(model), []
    with torch.set_grad_enabled(learns):
        for dtype in (torch.float32, default):
            torch.set_default_dtype(dtype)
            try:
                found.append(model(ids, return_routing=True))
            finally:
                torch.set_default_dtype(torch.float32)
    assert len(calls) == 6
    same(*found, bound=2e-5)
