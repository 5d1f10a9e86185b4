"""transformers' classes for our models: `import moekit.hf` registers `moekit` and `deepseek` with its Auto classes."""

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"moekit.hf needs transformers ({error}); pip install 'moekit[hf]'") from None

from moekit.hf.cache import Cache as Cache
from moekit.hf.callbacks import LogAuxLoss as LogAuxLoss
from moekit.hf.config import DeepseekConfig as DeepseekConfig
from moekit.hf.config import MoekitConfig as MoekitConfig
from moekit.hf.model import DeepseekForCausalLM as DeepseekForCausalLM
from moekit.hf.model import MoekitForCausalLM as MoekitForCausalLM

for _model in (MoekitForCausalLM, DeepseekForCausalLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
