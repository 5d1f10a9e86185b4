"""The language model: losses and masks, what training relies on, counts, and somebody else's implementations."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit import config as moekit_config
from moekit.config import ModelConfig, MoEConfig
from moekit.errors import ConfigError
from moekit.nn.cache import KVCache
from moekit.nn.ffn import SwiGLU
from moekit.nn.linear import Linear
from moekit.nn.model import Model
from moekit.nn.moe import MoE
from moekit.nn.router import Probe
from moekit.ops import balance
from moekit.ops.balance import LoadSums, measure

Make = Callable[..., ModelConfig]
TIGHT = {"rtol": 0, "atol": 1e-10}
V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
AUX = {"aux_loss_alpha": 0.02, "z_loss_alpha": 0.01}


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float64) -> Model:
    model = Model(config).to(device, dtype)
    for layer in model.moe_layers:
        if getattr(layer.router, "expert_bias", None) is not None:
            layer.router.expert_bias.normal_(std=0.3)
    return model


def tokens(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(0, 61, shape, device=device)


def gradients(model: Model) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


# loss


@pytest.mark.parametrize("training", [True, False])
def test_loss_equals_the_cross_entropy_of_its_own_logits(
    device: torch.device, tiny_config: Make, training: bool
) -> None:
    model, ids = build(tiny_config(), device), tokens(device, 3, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    logits = model.eval()(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    out = model.train(training)(ids, labels=labels)
    torch.testing.assert_close(out.loss, expected, **TIGHT)
    assert (out.logits is None) == training
    assert out.token_loss.tokens == 3 * 8 - 3
    torch.testing.assert_close(out.token_loss.total, expected * 21, **TIGHT)


@pytest.mark.parametrize("how", ["bias", "hook", "class"])
def test_the_loss_is_that_of_the_logits_whatever_the_head_does(
    device: torch.device, tiny_config: Make, how: str
) -> None:
    """In training too, where the logits of a plain head are never formed."""

    class Capped(Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 0.3 * torch.tanh(super().forward(input))

    model = Model(tiny_config())
    if how == "bias":
        model.lm_head.bias = nn.Parameter(torch.randn(model.config.vocab_size))
    elif how == "hook":
        model.lm_head.register_forward_hook(lambda _, inputs, logits: logits * 3)
    else:
        model.lm_head = Capped(model.config.hidden_size, model.config.vocab_size)
    model, ids = model.to(device), torch.randint(0, model.config.vocab_size, (2, 9), device=device)
    found, logits = model.train()(ids, labels=ids), model.eval()(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    weight = model.lm_head.weight
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (found.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_targets_are_labels_shifted_by_one_and_both_together_are_refused(
    device: torch.device, tiny_config: Make
) -> None:
    model, ids = build(tiny_config(), device), tokens(device, 2, 9)
    by_labels = model(ids[:, :-1], labels=ids[:, :-1])
    targets = torch.cat((ids[:, 1:-1], torch.full_like(ids[:, :1], -100)), 1)
    assert torch.equal(by_labels.loss, model(ids[:, :-1], targets=targets).loss)
    assert model(ids[:, :-1], targets=ids[:, 1:]).token_loss.tokens == 16
    with pytest.raises(ConfigError, match="labels and targets are both given"):
        model(ids, labels=ids, targets=ids)


def test_nothing_to_predict_is_a_loss_of_zero_with_finite_gradients(device: torch.device, tiny_config: Make) -> None:
    model, ids = build(tiny_config(ffn=AUX), device).train(), tokens(device, 1, 1)
    out = model(ids, labels=ids)
    assert out.loss == 0
    (out.loss + sum(out.aux.values())).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model))


def test_without_targets_training_gives_logits_and_balance_terms_and_evaluation_no_terms(
    device: torch.device, tiny_config: Make
) -> None:
    model, ids = build(tiny_config(ffn=AUX), device), tokens(device, 2, 5)
    trained, evaluated = model.train()(ids), model.eval()(ids)
    torch.testing.assert_close(trained.logits, evaluated.logits, **TIGHT)
    assert trained.aux.keys() == {"expert_balance", "router_z"}
    assert not evaluated.aux
    assert trained.loss is trained.token_loss is trained.routing is None


def test_loss_is_free_of_balance_terms_which_are_summed_over_layers(device: torch.device, tiny_config: Make) -> None:
    model, ids = build(tiny_config(ffn=AUX, num_hidden_layers=3), device).train(), tokens(device, 2, 9)
    out = model(ids, labels=ids, return_routing=True)
    assert len(out.routing) == 3
    expected = sum(0.02 * balance.expert_loss(measure(r, per_sequence=True)) for r in out.routing)
    torch.testing.assert_close(out.aux["expert_balance"], expected, **TIGHT)
    torch.testing.assert_close(out.aux["router_z"], sum(0.01 * balance.z_loss(r) for r in out.routing), **TIGHT)
    plain = build(tiny_config(num_hidden_layers=3), device).train()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(ids, labels=ids).loss, out.loss)


def test_global_balance_sees_the_load_of_the_earlier_micro_batches(device: torch.device, tiny_config: Make) -> None:
    model = build(tiny_config(ffn={"aux_loss_alpha": 0.1, "seq_aux": False, "global_aux": True}), device).train()
    one = model(tokens(device, 2, 9), return_routing=True)
    prior = [LoadSums(r.tokens_per_expert.sum(0), r.units.sum()) for r in one.routing]
    ids = tokens(device, 3, 9)
    two = model(ids, return_routing=True, prior_load=prior)
    expected = torch.zeros((), dtype=torch.float64, device=device)
    for a, b in zip(one.routing, two.routing, strict=True):
        load = (a.tokens_per_expert.sum(0) + b.tokens_per_expert.sum(0)).double() * 7 / 3 / (5 * 9)
        expected = expected + 0.1 * (load * b.scores.mean(0)).sum()
    torch.testing.assert_close(two.aux["expert_balance"], expected, **TIGHT)


def test_sums_over_micro_batches_give_the_gradient_of_the_full_batch(device: torch.device, tiny_config: Make) -> None:
    model, ids = build(tiny_config(ffn=V3), device).train(), tokens(device, 4, 9)
    labels = ids.clone()
    labels[0, 2:] = -100  # so that a mean of means would be wrong
    out = model(ids, labels=labels)
    out.loss.backward()
    full = gradients(model)
    model.zero_grad()
    for part, part_labels in zip(ids.split([1, 3]), labels.split([1, 3]), strict=True):
        (model(part, labels=part_labels).token_loss.total / out.token_loss.tokens).backward()
    torch.testing.assert_close(gradients(model), full, **TIGHT)


def test_recomputation_gives_the_same_loss_terms_counts_and_gradients_to_the_bit(
    device: torch.device, tiny_config: Make
) -> None:
    ffn = {**V3, **AUX, "capacity_factor": 1.0, "first_k_dense_replace": 1, "intermediate_size": 20}
    model = build(tiny_config(ffn=ffn, num_hidden_layers=3), device, torch.float32).train()
    ids, results = tokens(device, 3, 9), []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        out = model(ids, labels=ids, return_routing=True)
        (out.loss + sum(out.aux.values())).backward()
        counts = [r.tokens_per_expert for r in out.routing]
        results.append([out.loss, *out.aux.values(), *counts, *gradients(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# who sees what


@pytest.mark.parametrize("kind", ["mha", "mla"])
@torch.no_grad()
def test_a_token_changes_no_logit_before_it(device: torch.device, tiny_config: Make, kind: str) -> None:
    model = build(tiny_config(attention={"kind": kind}, ffn=V3), device).eval()
    ids = tokens(device, 2, 9)
    before = model(ids).logits
    for t in range(9):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % 61
        moved = (model(other).logits - before).abs().amax((0, 2))
        assert (moved[:t] < 1e-12).all()
        assert (moved[t:] > 1e-6).all()


@pytest.mark.parametrize("kind", ["mha", "mla"])
@torch.no_grad()
def test_documents_packed_together_equal_documents_alone(device: torch.device, tiny_config: Make, kind: str) -> None:
    model, ids = build(tiny_config(attention={"kind": kind}), device).eval(), tokens(device, 1, 9)
    packed = model(ids, document_ids=torch.tensor([[0] * 4 + [1] * 5], device=device)).logits
    # rotary positions are relative, so the second document may start anywhere; positions in float32 cost 1e-7
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]).logits, **TIGHT)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).logits, rtol=0, atol=1e-5)
    assert (packed[:, 4:] - model(ids).logits[:, 4:]).abs().max() > 1e-3


def test_padding_changes_no_real_logit_no_loss_and_no_balance_term(device: torch.device, tiny_config: Make) -> None:
    model, lengths = build(tiny_config(ffn=AUX), device), [9, 4, 6]
    ids = tokens(device, 3, 9)
    mask = torch.arange(9, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    padded = model.eval()(ids, labels=ids, padding_mask=mask, return_routing=True)
    alone = [
        model(row[None, :n], labels=row[None, :n], return_routing=True) for row, n in zip(ids, lengths, strict=True)
    ]
    for s, n in enumerate(lengths):
        torch.testing.assert_close(padded.logits[s, :n], alone[s].logits[0], **TIGHT)
    total = sum(out.token_loss.total for out in alone)
    torch.testing.assert_close(padded.token_loss.total, total, **TIGHT)
    assert padded.token_loss.tokens == sum(lengths) - 3
    torch.testing.assert_close(
        padded.aux["expert_balance"], sum(out.aux["expert_balance"] for out in alone) / 3, **TIGHT
    )
    z = sum(n * out.aux["router_z"] for n, out in zip(lengths, alone, strict=True)) / sum(lengths)
    torch.testing.assert_close(padded.aux["router_z"], z, **TIGHT)
    for layer in range(2):
        counts = torch.cat([out.routing[layer].tokens_per_expert for out in alone])
        assert torch.equal(padded.routing[layer].tokens_per_expert, counts)


def test_padding_before_real_tokens_is_refused(device: torch.device, tiny_config: Make) -> None:
    model = build(tiny_config(), device)
    mask = torch.tensor([[False, True, True], [True, True, True]], device=device)
    with pytest.raises(ConfigError, match="padding_mask has padding before real tokens; pad on the right"):
        model(tokens(device, 2, 3), padding_mask=mask)


def test_logits_are_spared_on_request_and_the_loss_is_the_same(device: torch.device, tiny_config: Make) -> None:
    model, ids = build(tiny_config(), device).eval(), tokens(device, 2, 6)
    spared, full = model(ids, labels=ids, return_logits=False), model(ids, labels=ids)
    assert spared.logits is None
    assert full.logits is not None
    assert torch.equal(spared.loss, full.loss)


def test_shapes_can_be_computed_without_storage(tiny_config: Make) -> None:
    with torch.device("meta"):
        model = Model(tiny_config(ffn={"kind": "dense"}))
        assert model(torch.zeros(2, 5, dtype=torch.int64)).logits.shape[:2] == (2, 5)


def test_a_context_that_is_too_long_is_refused(device: torch.device, tiny_config: Make) -> None:
    with pytest.raises(ConfigError, match="has 65 tokens but max_position_embeddings is 64"):
        build(tiny_config(), device)(tokens(device, 1, 65))


# parameters


def test_leading_and_interleaved_dense_layers_are_where_the_configuration_says(tiny_config: Make) -> None:
    ffn = {"first_k_dense_replace": 1, "moe_layer_freq": 2, "intermediate_size": 20}
    model = Model(tiny_config(ffn=ffn, num_hidden_layers=6))
    kinds = [type(block.mlp) for block in model.layers]
    assert kinds == [SwiGLU, SwiGLU, MoE, SwiGLU, MoE, SwiGLU]
    assert model.config.moe_layers == [2, 4]
    assert model.layers[0].mlp.gate_proj.weight.shape == (20, 18)
    assert len(model(torch.zeros(1, 2, dtype=torch.int64), return_routing=True).routing) == 2


def test_tied_embeddings_share_one_parameter_that_both_ends_train(device: torch.device, tiny_config: Make) -> None:
    config = tiny_config(tie_word_embeddings=True)
    model = build(config, device)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters
    ids = tokens(device, 1, 4)
    untied = build(tiny_config(), device)
    untied.load_state_dict(model.state_dict())
    for m in (model, untied):
        m(ids, labels=ids).loss.backward()
    both = untied.embed_tokens.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(model.embed_tokens.weight.grad, both, **TIGHT)


@pytest.mark.parametrize(
    "ffn",
    [V3, {"topk_method": "hash"}, {"kind": "dense"}, {"first_k_dense_replace": 1, "intermediate_size": 9}],
    ids=["bias", "hash", "dense", "leading dense"],
)
def test_state_dict_holds_all_that_the_function_depends_on(
    device: torch.device, tiny_config: Make, ffn: dict[str, Any]
) -> None:
    config, ids = tiny_config(ffn=ffn), tokens(device, 2, 7)
    model, other = build(config, device).eval(), build(config, device).eval()
    assert model.state_dict().keys() == dict([*model.named_parameters(), *model.named_buffers()]).keys()
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_every_parameter_gets_a_gradient(device: torch.device, tiny_config: Make) -> None:
    model = build(tiny_config(attention={"kind": "mla", "q_lora_rank": 7}), device).train()
    ids = tokens(device, 4, 16)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def _initialised(model: Model, std: float) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith(".bias") else 1)).all(), name
        else:
            assert abs(float(parameter.detach().std()) / std - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
            assert abs(float(parameter.detach().mean())) < 5 * std / parameter.numel() ** 0.5, name


def test_every_matrix_starts_with_the_configured_deviation_norms_with_one_and_biases_with_zero(
    tiny_config: Make,
) -> None:
    # bounds are five standard errors; the smallest matrix has 126 entries, but for a gate's 18
    latent = {"kind": "mla", "q_lora_rank": 7, "attention_bias": True}
    _initialised(Model(tiny_config(initializer_range=0.006, attention=latent)), 0.006)
    biased = {"attention_bias": "all", "qk_norm": "head"}
    gated = {"shared_expert_gate": True}
    _initialised(Model(tiny_config(initializer_range=0.006, attention=biased, ffn=gated)), 0.006)


def test_a_model_built_without_storage_is_initialised_by_reset_parameters(tiny_config: Make) -> None:
    with torch.device("meta"):
        model = Model(tiny_config(initializer_range=0.006, ffn=V3))
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7)  # what uninitialised memory may hold
    model.reset_parameters()
    _initialised(model, 0.006)
    assert all((layer.router.expert_bias == 0).all() for layer in model.moe_layers)


def _roles(model: Model) -> Iterator[tuple[str, int]]:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            role = "norm"
        elif name.startswith("embed_tokens"):
            role = "embedding"
        elif name.startswith("lm_head"):
            role = "head"
        elif ".self_attn." in name:
            role = "attention"
        else:
            known = {"router": "router", "experts": "routed", "shared_experts": "shared"}
            role = known.get(name.split(".mlp.")[1].split(".")[0], "dense")
        yield role, parameter.numel()


@pytest.mark.parametrize("name", [name for name in moekit_config.preset_names() if not name.startswith("meo-")])
def test_built_model_has_the_parameters_that_its_preset_counts(name: str) -> None:
    config = moekit_config.preset(name)
    with torch.device("meta"):
        model = Model(config)
    built = dict.fromkeys(moekit_config.parameters(config), 0)
    for role, size in _roles(model):
        built[role] += size
    assert built == {role: count.total for role, count in moekit_config.parameters(config).items()}
    assert sum(built.values()) == config.num_parameters
    held = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert held == moekit_config.buffer_bytes(config)


# working precisions


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_autocast_and_bf16_weights_stay_close_to_float32(device: torch.device, tiny_config: Make, kind: str) -> None:
    config = tiny_config(attention={"kind": kind}, ffn=AUX, initializer_range=0.1)
    model, ids = build(config, device, torch.float32).train(), tokens(device, 4, 16)
    exact = model(ids, labels=ids)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = model(ids, labels=ids)
    (mixed.loss + sum(mixed.aux.values())).backward()
    assert mixed.loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients(model))
    assert abs(float(mixed.loss.detach() - exact.loss.detach())) < 0.01  # measured over ten seeds: 7e-4
    low = build(config, device, torch.bfloat16).train()
    low.load_state_dict(model.state_dict())
    out = low(ids, labels=ids)
    (out.loss + sum(out.aux.values())).backward()
    assert abs(float(out.loss.detach() - exact.loss.detach())) < 0.01  # measured over ten seeds: 1.1e-3
    assert all(gradient.isfinite().all() for gradient in gradients(low))


# somebody else's code


def _transplant(model: Model, theirs: nn.Module) -> None:
    """Copies the weights of a transformers model, whose names are ours but for the router and the `model.` prefix."""
    renamed = {
        name.removeprefix("model.")
        .replace("mlp.gate.weight", "mlp.router.weight")
        .replace("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias")
        .replace("shared_expert.", "shared_experts."): tensor
        for name, tensor in theirs.state_dict().items()
        if "shared_expert_gate" not in name
    }
    model.load_state_dict(renamed)


def _randomise(theirs: nn.Module) -> None:
    for name, tensor in theirs.state_dict().items():
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif "gate.weight" in name:
            nn.init.normal_(tensor, std=1.0)
        else:
            nn.init.normal_(tensor, std=0.12)


@torch.no_grad()
def _agree(
    config: ModelConfig, theirs: nn.Module, device: torch.device, rows: Callable[[Model], None] | None = None
) -> None:
    model = Model(config).to(device).eval()
    _transplant(model, theirs)
    if rows is not None:
        rows(model)
    ids = tokens(device, 3, 40)
    expected = theirs.to(device).eval()(input_ids=ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)  # measured over three seeds: 3e-6
    loss = theirs(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids).loss, loss, rtol=0, atol=1e-5)


_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 12,
    "intermediate_size": 20,
    "num_experts_per_tok": 3,
}
_EXPERTS = {"moe_intermediate_size": 12, "intermediate_size": 20, "first_k_dense_replace": 1, "num_experts_per_tok": 3}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_deepseek_v1_agrees_with_qwen2_moe_whose_shared_gate_is_open(
    device: torch.device, tiny_config: Make, kv_heads: int, norm_topk_prob: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **_SIZES,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=6,
            qkv_bias=False,
            num_experts=7,
            shared_expert_intermediate_size=24,
            norm_topk_prob=norm_topk_prob,
            mlp_only_layers=[0],
            rope_parameters=_PLAIN,
            tie_word_embeddings=False,
        )
    )
    _randomise(theirs)
    for layer in theirs.model.layers[1:]:
        layer.mlp.shared_expert_gate = nn.Linear(24, 1)
        nn.init.zeros_(layer.mlp.shared_expert_gate.weight)
        nn.init.constant_(layer.mlp.shared_expert_gate.bias, 40.0)  # sigmoid(40) is 1 in float32
    ffn = {**_EXPERTS, "n_shared_experts": 2, "norm_topk_prob": norm_topk_prob}
    attention = {"num_key_value_heads": kv_heads}
    _agree(tiny_config(hidden_size=24, num_hidden_layers=3, attention=attention, ffn=ffn), theirs, device)


_MLA = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}


@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
@pytest.mark.parametrize("q_lora_rank", [None, 7])
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2_agrees_with_transformers(
    device: torch.device, tiny_config: Make, method: str, q_lora_rank: int | None, yarn: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    groups = {"n_group": 4, "topk_group": 2} if method == "group_limited_greedy" else {}
    theirs = transformers.DeepseekV2ForCausalLM(
        transformers.DeepseekV2Config(
            **_SIZES,
            **_MLA,
            **groups,
            num_attention_heads=3,
            q_lora_rank=q_lora_rank,
            n_routed_experts=8,
            n_shared_experts=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            topk_method=method,
            rope_parameters={**_PLAIN, **({"rope_type": "yarn", **_YARN} if yarn else {})},
        )
    )
    _randomise(theirs)
    ffn = {**_EXPERTS, **groups, "n_routed_experts": 8, "n_shared_experts": 2}
    ffn |= {"topk_method": method, "routed_scaling_factor": 1.5}
    attention = {"kind": "mla", "q_lora_rank": q_lora_rank, "rope": {"yarn": _YARN if yarn else None}}
    _agree(tiny_config(hidden_size=24, num_hidden_layers=3, attention=attention, ffn=ffn), theirs, device)


def _interleave(model: Model) -> None:
    """Reorders the rotated rows of queries and keys from half-split to interleaved pairs."""
    order = torch.tensor([0, 2, 1, 3])
    for block in model.layers:
        mla = block.self_attn
        q = mla.q_b_proj.weight.unflatten(0, (3, 10))
        q[:, 6:] = q[:, 6:][:, order].clone()
        mla.kv_a_proj_with_mqa.weight[10:] = mla.kv_a_proj_with_mqa.weight[10:][order].clone()


@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
@pytest.mark.parametrize("interleave", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_deepseek_v3_agrees_with_transformers(
    device: torch.device, tiny_config: Make, norm_topk_prob: bool, interleave: bool, yarn: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": norm_topk_prob,
    }
    theirs = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **_SIZES,
            **_MLA,
            **shape,
            num_attention_heads=3,
            num_key_value_heads=3,
            q_lora_rank=7,
            rope_interleave=interleave,
            rope_parameters={**_PLAIN, **({"rope_type": "yarn", **_YARN} if yarn else {})},
        )
    )
    _randomise(theirs)
    ffn = {**_EXPERTS, **shape, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    attention = {"kind": "mla", "q_lora_rank": 7, "rope": {"yarn": _YARN if yarn else None}}
    config = tiny_config(hidden_size=24, num_hidden_layers=3, attention=attention, ffn=ffn)
    assert isinstance(config.ffn, MoEConfig)
    _agree(config, theirs, device, None if interleave else _interleave)


# probes

PROBE = Probe(skip_top=1, num_experts_per_tok=2, shared=False)


def test_a_probe_alters_one_pass_and_leaves_the_model_as_it_was(device: torch.device, tiny_config: Make) -> None:
    model, ids = build(tiny_config(), device).eval(), tokens(device, 2, 9)
    before = model(ids, labels=ids, return_routing=True)
    probed = model(ids, labels=ids, return_routing=True, probe=PROBE)
    after = model(ids, labels=ids, return_routing=True)
    assert probed.loss != before.loss
    assert [routing.expert_ids.shape[1] for routing in probed.routing] == [2, 2]
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.logits, model(ids, probe=Probe()).logits)
    assert model.config == tiny_config()


def test_each_layer_may_have_a_probe_of_its_own_whatever_layers_are_dense(
    device: torch.device, tiny_config: Make
) -> None:
    ffn = {"first_k_dense_replace": 1, "moe_layer_freq": 2, "intermediate_size": 20}  # dense, dense, MoE, dense, MoE
    model, ids = build(tiny_config(ffn=ffn, num_hidden_layers=5), device).eval(), tokens(device, 1, 9)

    def chosen(*probe: Probe | None) -> list[int]:
        return [routing.expert_ids.shape[1] for routing in model(ids, return_routing=True, probe=probe).routing]

    assert chosen(Probe(num_experts_per_tok=1), None) == [1, 3]
    assert chosen(None, Probe(num_experts_per_tok=2)) == [3, 2]
    assert torch.equal(model(ids, probe=[PROBE, PROBE]).logits, model(ids, probe=PROBE).logits)
    with pytest.raises(ConfigError, match="probe has 3 entries but the model has 2 MoE layers; give one, or one for"):
        chosen(PROBE, PROBE, PROBE)


def test_a_dense_model_has_nothing_to_probe(device: torch.device, tiny_config: Make) -> None:
    model = build(tiny_config(ffn={"kind": "dense"}), device)
    with pytest.raises(ConfigError, match="the model has no MoE layer, so there is no routing to alter"):
        model(tokens(device, 1, 3), probe=Probe())


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_probed_passes_over_a_cache_equal_one_probed_pass(device: torch.device, tiny_config: Make, kind: str) -> None:
    model, ids = build(tiny_config(attention={"kind": kind}), device).eval(), tokens(device, 2, 9)
    cache = KVCache(model.config, 2, 9, device, torch.float64)
    with torch.no_grad():
        parts = [model(part, cache=cache, probe=PROBE).logits for part in ids.split([4, 1, 3, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids, probe=PROBE).logits, **TIGHT)


def test_recomputation_probes_as_the_forward_pass_did(device: torch.device, tiny_config: Make) -> None:
    ids, found = tokens(device, 2, 9), []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = build(tiny_config(ffn={"aux_loss_alpha": 0.1}), device).train()
        model.recompute = recompute
        out = model(ids, labels=ids, probe=PROBE._replace(shared=True))
        (out.loss + sum(out.aux.values())).backward()
        found.append([parameter.grad for name, parameter in model.named_parameters() if "shared" not in name])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
