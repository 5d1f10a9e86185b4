"""A trace is the routing, as arrays and on a page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from moekit.config import ModelConfig
from moekit.errors import ConfigError, DataError
from moekit.inspect.trace import Trace, trace, trace_page, write_trace
from moekit.nn.model import Model

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("ffn", [{}, {"topk_method": "hash"}, {"first_k_dense_replace": 1, "intermediate_size": 20}])
def test_a_trace_is_the_routing_of_the_model(tiny_config: Callable[..., ModelConfig], ffn: dict[str, object]) -> None:
    model = Model(tiny_config(ffn=ffn)).eval()
    found = trace(model, IDS)
    with torch.no_grad():
        routings = model(torch.tensor([IDS]), return_routing=True).routing
    assert found.token_ids.tolist() == IDS
    assert found.expert_ids.shape == found.weights.shape == (8, len(routings), 3)
    assert (found.expert_ids.dtype, found.weights.dtype) == (np.int16, np.float32)
    for at, routing in enumerate(routings):
        assert np.array_equal(found.expert_ids[:, at], routing.expert_ids.numpy())
        assert np.array_equal(found.weights[:, at], routing.weights.numpy())


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_trace_is_read_back_as_it_was_written(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path, suffix: str
) -> None:
    found = trace(Model(tiny_config()).eval(), IDS)
    path = tmp_path / f"trace.{suffix}"
    write_trace(path, found)
    arrays = dict(np.load(path)) if suffix == "npz" else load_file(path)
    assert set(arrays) == set(Trace._fields)
    for name, array in arrays.items():
        assert np.array_equal(array, getattr(found, name))
        assert array.dtype == getattr(found, name).dtype


def test_the_page_holds_the_trace_and_needs_nothing_else(tiny_config: Callable[..., ModelConfig]) -> None:
    found = trace(Model(tiny_config()).eval(), IDS)
    texts = ["</script>", "<!--", " a", "\n", "\x00", "诗", "&amp;", "\u2028"]
    page = trace_page(found, texts, [0, 1], 7, "a <model>")
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    told = json.loads(data)
    assert told["tokens"] == ["</script>", "<!--", " a", "⏎", "\x00", "诗", "&amp;", "\u2028"]
    assert (told["layers"], told["k"], told["experts"], told["breaks"]) == ([0, 1], 3, 7, [3])
    assert np.array_equal(np.reshape(told["ids"], (8, 2, 3)), found.expert_ids)
    assert np.abs(np.reshape(told["weights"], (8, 2, 3)) / 1e4 - found.weights).max() <= 5e-5
    assert "a &lt;model&gt;" in page
    assert "://" not in page
    assert not re.search(r"<(link|iframe|img)|@import|url\(|src=|fetch\(", page)


def test_what_cannot_be_traced_is_one_line(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    model = Model(tiny_config())
    for ids in ([], [1] * 65):
        with pytest.raises(DataError, match=f"has {len(ids)} tokens; allowed: 1 to 64"):
            trace(model, ids)
    with pytest.raises(ConfigError, match="dense"):
        trace(Model(tiny_config(ffn={"kind": "dense"})), IDS)
    with pytest.raises(ConfigError, match=r"suffix '.csv'; a trace is .npz or .safetensors"):
        write_trace(tmp_path / "trace.csv", trace(model.eval(), IDS))
