"""CogVLM on Vicuna: image tokens have their own attention and MLP; queries, keys and values are one tensor."""

from modalloy.families.rules import Family, decoder, outside, twins

QKV = ("q", "k", "v")

COGVLM = Family(
    "cogvlm",
    ("CogVLMForCausalLM",),
    ("cogvlm",),
    (
        *decoder(without=("q", "k", "v", "o", "gate", "up", "down")),
        *twins("self_attn.{}_query_key_value.weight", language="language_expert", vision="vision_expert", roles=QKV),
        *twins("self_attn.{}_dense.weight", language="language_expert", vision="vision_expert", roles=("o",)),
        *twins("mlp.{}.gate_proj.weight", language="language_mlp", vision="vision_mlp", roles=("gate",)),
        *twins("mlp.{}.up_proj.weight", language="language_mlp", vision="vision_mlp", roles=("up",)),
        *twins("mlp.{}.down_proj.weight", language="language_mlp", vision="vision_mlp", roles=("down",)),
        *outside("projector", "model.vision.linear_proj.{rest}"),
        *outside("image separator", "model.vision.boi", "model.vision.eoi"),
        *outside("vision encoder", "model.vision.patch_embedding.{rest}", "model.vision.transformer.{rest}"),
    ),
)
