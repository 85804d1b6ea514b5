"""From which pretrained decoder a model descends: by what its config records of published models, and by its weights."""

import re
from typing import TYPE_CHECKING, Any

from modalloy.errors import CheckpointError

if TYPE_CHECKING:
    pass

# pretrained decoder -> models trained from it, as their cards and papers say
DESCENDANTS = {
    "meta-llama/Llama-2-7b-hf": (
        "meta-llama/Llama-2-7b-chat-hf",
        "lmsys/vicuna-7b-v1.5",
        "liuhaotian/llava-v1.5-7b",
        "llava-hf/llava-1.5-7b-hf",
        "Lin-Chen/ShareGPT4V-7B",
        "THUDM/cogvlm-base-490-hf",
        "THUDM/cogvlm-chat-hf",
        "THUDM/cogvlm-grounding-generalist-hf",
        "MAGAer13/mplug-owl2-llama2-7b",
    ),
    "Qwen/Qwen2-7B": (
        "Qwen/Qwen2-7B-Instruct",
        "Qwen/Qwen2-VL-7B",
        "Qwen/Qwen2-VL-7B-Instruct",
        "lmms-lab/llava-onevision-qwen2-7b-si",
        "lmms-lab/llava-onevision-qwen2-7b-ov",
        "llava-hf/llava-onevision-qwen2-7b-si-hf",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    ),
    "01-ai/Yi-34B": (
        "01-ai/Yi-34B-Chat",
        "01-ai/Yi-VL-34B",
        "NousResearch/Nous-Hermes-2-Yi-34B",
        "nyu-visionx/cambrian-34b",
    ),
    "internlm/internlm2_5-7b": ("internlm/internlm2_5-7b-chat", "OpenGVLab/InternVL2_5-8B"),
    "Qwen/Qwen2.5-0.5B": ("Qwen/Qwen2.5-0.5B-Instruct", "OpenGVLab/InternVL2_5-1B"),
    "Qwen/Qwen2.5-3B": ("Qwen/Qwen2.5-3B-Instruct", "OpenGVLab/InternVL2_5-4B"),
    "Qwen/Qwen2.5-32B": ("Qwen/Qwen2.5-32B-Instruct", "OpenGVLab/InternVL2_5-38B"),
    "HuggingFaceTB/SmolLM2-135M": ("HuggingFaceTB/SmolLM2-135M-Instruct", "builtin:smollm2-135m-instruct"),
    "mistralai/Mistral-7B-v0.2": ("mistralai/Mistral-7B-Instruct-v0.2", "liuhaotian/llava-v1.6-mistral-7b"),
}
# by the last part of the name too, which is what a downloaded folder is called
ANCESTORS = {
    key: ancestor
    for ancestor, models in DESCENDANTS.items()
    for model in (ancestor, *models)
    for key in (model.lower(), model.lower().rpartition("/")[2])
}


CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>[^/]+)(?:/|$)")  # a folder of the hub's cache


def ancestor(config: dict[str, Any], location: str = "") -> str | None:
    """The pretrained decoder of a model, by the names that its config records and by where it comes from; None if unknown.

    Of a name that is in no table nothing is known: it may be a folder, or a model trained from any other.
    """
    text = config.get("text_config", config.get("llm_config"))
    parts = [part for part in (config, text) if isinstance(part, dict)]
    recorded = [name for part in parts if isinstance(name := part.get("_name_or_path"), str) and name]
    for name in (*recorded, location):
        cached = CACHED.search(name)
        plain = f"{cached['owner']}/{cached['name']}" if cached else name.partition("@")[0].rstrip("/")
        plain = plain.replace("\\", "/").lower()
        if found := ANCESTORS.get(plain) or ANCESTORS.get(plain.rpartition("/")[2]):
            return found
    return None


def check_ancestors(target: tuple[str, str | None], other: tuple[str, str | None]) -> str:
    """What two models' records, (label, ancestor) each, say of a common ancestor; refuses those of different ones.

    Weights of different ancestors have nothing to do with each other, whatever their shapes.
    """
    (label, wanted), (name, found) = target, other
    if found is None or wanted is None:
        return "not known by name; the merge compares weights"
    if found != wanted:
        raise CheckpointError(
            f"{name} descends from '{found}', {label} from '{wanted}'; choose models of one ancestor, or say "
            "--allow-base-mismatch if you know that they are"
        )
    return found
