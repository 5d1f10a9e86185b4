"""A directory as DeepSeek-V3 is released: matrices in 8-bit floating point, a scale for each block of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moekit.config import ModelConfig
from moekit.formats.checkpoint import save
from moekit.nn.model import Model

BLOCK = (8, 4)


@pytest.fixture
def fp8(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> Path:
    """Returns the directory, with what others write and no more."""
    ffn = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
    ffn |= {"first_k_dense_replace": 1, "intermediate_size": 20}
    model = Model(tiny_config(hidden_size=24, attention={"kind": "mla", "q_lora_rank": 5}, ffn=ffn)).bfloat16()
    folder = tmp_path / "fp8"
    save(model, folder, layout="deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if "_proj" in key]:
        weight = tensors[key].float()
        scales = F.max_pool2d(weight.abs()[None], BLOCK, BLOCK, ceil_mode=True)[0] / 448
        each = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        tensors[key] = (weight / each[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors")
    for name in ("manifest.json", "receipt.json"):
        (folder / name).unlink()
    codes = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK}
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": codes}))
    return folder
