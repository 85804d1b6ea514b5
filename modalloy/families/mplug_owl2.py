"""mPLUG-Owl2 on Llama 2: image tokens have their own norms, keys and values (`multiway.1`)."""

from modalloy.families.rules import Family, decoder, outside, twins

MPLUG_OWL2 = Family(
    "mplug_owl2",
    ("MPLUGOwl2LlamaForCausalLM",),
    ("mplug_owl2",),
    (
        *decoder(without=("input_norm", "post_norm", "k", "v")),
        *twins("input_layernorm.{}.weight", language="multiway.0", vision="multiway.1", roles=("input_norm",)),
        *twins("post_attention_layernorm.{}.weight", language="multiway.0", vision="multiway.1", roles=("post_norm",)),
        *twins("self_attn.k_proj.{}.weight", language="multiway.0", vision="multiway.1", roles=("k",)),
        *twins("self_attn.v_proj.{}.weight", language="multiway.0", vision="multiway.1", roles=("v",)),
        *outside("vision encoder", "model.vision_model.{rest}"),
        *outside("projector", "model.visual_abstractor.{rest}"),
    ),
)
