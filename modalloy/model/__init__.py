"""The merged model under Hugging Face names: config, processor, routed decoder, loading.

Importing this registers them with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from modalloy.model.chat import ChatModel
from modalloy.model.config import ModalloyConfig
from modalloy.model.load import load_model
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import ModalloyProcessor

AutoConfig.register("modalloy", ModalloyConfig)
AutoModelForCausalLM.register(ModalloyConfig, ModalloyForConditionalGeneration)
AutoModelForMultimodalLM.register(ModalloyConfig, ModalloyForConditionalGeneration)
AutoProcessor.register(ModalloyConfig, ModalloyProcessor)

__all__ = ["ChatModel", "ModalloyConfig", "ModalloyForConditionalGeneration", "ModalloyProcessor", "load_model"]
