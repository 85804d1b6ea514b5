"""The merged model under Hugging Face names: config, processor, routed decoder, loading."""

from transformers import AutoConfig

from modalloy.model.chat import ChatModel
from modalloy.model.config import ModalloyConfig
from modalloy.model.load import load_model
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import ModalloyProcessor

AutoConfig.register("modalloy", ModalloyConfig)

__all__ = ["ChatModel", "ModalloyConfig", "ModalloyForConditionalGeneration", "ModalloyProcessor", "load_model"]
