"""Llama, Vicuna, LLaVA-1.5 (its own and Hugging Face's spelling), and what is built like it: Yi-VL, Cambrian."""

from modalloy.families.rules import Family, Spelling, decoder, outside

HUGGING_FACE = (Spelling("language_model.model.", "language_model."), Spelling("model.language_model.", ""))
VISION = (
    *outside("vision encoder", "model.vision_tower.{rest}", "vision_tower.{rest}"),
    *outside(
        "projector", "model.mm_projector.{rest}", "model.multi_modal_projector.{rest}", "multi_modal_projector.{rest}"
    ),
    *outside("image separator", "model.image_newline", "image_newline"),
)
CAMBRIAN = (
    *outside("vision encoder", "model.vision_tower_aux_list.{rest}"),
    *outside(
        "projector",
        "model.mm_projector_aux_{rest}",
        "model.vision_query",
        "model.vision_sampler_{rest}",
    ),
)

LLAMA = Family(
    "llama",
    (
        "LlamaForCausalLM",
        "LlavaLlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "CambrianLlamaForCausalLM",
    ),
    ("llama", "llava", "llava_llama", "cambrian_llama"),
    (*decoder(), *VISION, *CAMBRIAN),
    (Spelling(), *HUGGING_FACE),
    # of LlamaConfig, which Hugging Face's LLaVA leaves out
    {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
)
