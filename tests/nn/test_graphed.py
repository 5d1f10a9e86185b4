"""The step that a CUDA graph records equals the model's own, and waits for no answer of the device."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.config import ModelConfig
from moekit.errors import UnsupportedError
from moekit.nn.cache import KVCache
from moekit.nn.graphed import StaticStep, asks_nothing, graphed
from moekit.nn.model import Model

KINDS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "latent attention": {"attention": {"kind": "mla"}},
    "dense": {"ffn": {"kind": "dense"}},
    "YaRN": {"attention": {"rope": {"yarn": {"factor": 4.0, "original_max_position_embeddings": 16}}}},
    "hash": {"ffn": {"topk_method": "hash"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_step_is_the_models_own(
    tiny_config: Callable[..., ModelConfig], device: torch.device, kind: str
) -> None:
    model = Model(tiny_config(**KINDS[kind])).eval().to(device)
    prompt, lengths = torch.randint(61, (3, 4), device=device), torch.tensor([1, 4, 2], device=device)
    mask = torch.arange(4, device=device) < lengths.unsqueeze(1)
    caches = [KVCache(model.config, 3, 12, device=device) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(prompt, cache=cache, padding_mask=mask)
        step = graphed(model, caches[0]) or StaticStep(model, caches[0])
        for _ in range(6):
            ids = torch.randint(61, (3,), device=device)
            found = step.step(ids, caches[0].lengths)
            caches[0].advance(torch.ones_like(lengths), 1)
            torch.testing.assert_close(found, model(ids.unsqueeze(1), cache=caches[1]).logits[:, 0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a device that is not the current one")
def test_the_step_is_recorded_on_the_models_device(tiny_config: Callable[..., ModelConfig]) -> None:
    config, other = tiny_config(ffn={"kind": "dense"}), torch.device("cuda:1")
    model = Model(config).eval().to(other)
    step = graphed(model, KVCache(config, 2, 8, device=other))
    assert step is not None
    lengths = torch.zeros(2, dtype=torch.int64, device=other)
    first, second = (step.step(torch.full((2,), number, device=other), lengths) for number in (3, 5))
    assert not torch.equal(first, second)


class Asking(StaticStep):
    """A step that waits for an answer of the device, which cannot be recorded."""

    def run(self) -> None:
        super().run()
        self.logits.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a device records")
def test_a_failed_recording_leaves_the_stream_as_it_was(tiny_config: Callable[..., ModelConfig]) -> None:
    config, device = tiny_config(ffn={"kind": "dense"}), torch.device("cuda:0")
    model, before = Model(config).eval().to(device), torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError):
        Asking(model, KVCache(config, 1, 8, device=device)).capture()
    assert torch.cuda.current_stream(device) == before


SCRIPT = """
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from moekit.config import ModelConfig
from moekit.nn.cache import KVCache
from moekit.nn.graphed import StaticStep, asks_nothing
from moekit.nn.model import Model

model = Model(ModelConfig.model_validate_json(r'''CONFIG''')).eval().to(torch.bfloat16)
for backend, asks in (("grouped", False), ("torch", True)):
    model.set_experts_backend(backend)
    assert asks_nothing(model) is not asks
    StaticStep(model, KVCache(model.config, 2, 8, dtype=torch.bfloat16)).run()
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes without values: there is no answer to be had
        try:
            StaticStep(model, KVCache(model.config, 2, 8, dtype=torch.bfloat16)).run()
            assert not asks
        except DataDependentOutputException:
            assert asks
"""


def test_it_waits_for_no_answer_with_grouped_products_and_does_with_a_loop(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    config = tiny_config(hidden_size=32, ffn={"moe_intermediate_size": 16})  # widths that grouped products take
    script = SCRIPT.replace("CONFIG", config.model_dump_json())
    environment = {**os.environ, "MOEKIT_NATIVE": "0"}  # its kernels take addresses, which such tensors have none of
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_on_a_cpu_there_is_no_graph(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config()).eval()
    assert graphed(model, KVCache(model.config, 1, 8)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a device can be waited for")
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_experts_that_ask_nothing_can_be_recorded(tiny_config: Callable[..., ModelConfig], backend: str) -> None:
    config = tiny_config(hidden_size=32, ffn={"moe_intermediate_size": 16})
    model = Model(config).eval().to("cuda:0", torch.bfloat16)
    try:
        model.set_experts_backend(backend)
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert asks_nothing(model)
    StaticStep(model, KVCache(config, 2, 8, "cuda:0", torch.bfloat16)).capture()
