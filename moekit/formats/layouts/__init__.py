"""Other libraries' model directories, both ways: one table a `model_type`."""

from moekit.config import ModelConfig
from moekit.errors import UnsupportedError
from moekit.formats.layouts.deepseek import DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3
from moekit.formats.layouts.layout import Layout
from moekit.formats.layouts.llama import LLAMA, MIXTRAL, OLMOE
from moekit.formats.layouts.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

LAYOUTS: dict[str, Layout] = {
    "deepseek": DEEPSEEK,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "mixtral": MIXTRAL,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}


def fitting(config: ModelConfig) -> str:
    """Returns the first layout that can hold a model; UnsupportedError with the nearest one's reason if none can."""
    reasons = {}
    for name, layout in LAYOUTS.items():
        if (layout.attention, layout.ffn) == (config.attention.kind, config.ffn.kind):
            try:
                layout.write(config)
                return name
            except UnsupportedError as error:
                reasons[name] = str(error)
    none = f"none has attention.kind {config.attention.kind} with ffn.kind {config.ffn.kind}"
    raise UnsupportedError(f"no other library's layout can hold this model: {'; '.join(reasons.values()) or none}")
