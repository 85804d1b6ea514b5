"""Merged models in other runtimes: llama.cpp gives PyTorch's logits, transformers needs nothing of ours, vLLM is told the truth.

llama.cpp is an extra: where it is not installed, what needs it is skipped, and says so.
"""

import _ctypes
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FFN, HEADS, KV_HEADS, LAYERS, TEMPLATE, WIDTH, write_omni
from serving import PICTURE, SOUND, image, site, sound, text

from modalloy.cli import main
from modalloy.errors import CheckpointError, ModalloyError, OutOfMemoryError
from modalloy.export.bundle import bundle
from modalloy.export.tokens import CONTRACTIONS, SPLITS
from modalloy.export.transformers import export as export_transformers
from modalloy.export.vllm import export as export_vllm
from modalloy.export.weights import Geometry, write_base
from modalloy.model import ChatModel, load_model
from modalloy.model.chat import user_message
from modalloy.model.llama_cpp import LLAMA_CPP, LlamaChat, load_exported
from modalloy.model.load import Stored
from modalloy.model.sequences import chunks

needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None,
    reason='llama.cpp is not installed: pip install "modalloy[llamacpp]"',
)
SHARED: dict[str, Any] = {
    **{"hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
    **{"num_key_value_heads": KV_HEADS, "max_position_embeddings": 512, "initializer_range": 0.3},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "head_dim": WIDTH // HEADS},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
QUESTION = "what is this ?"
CLOSE = 2e-4  # of logits, relative to the largest


def config_of(kind: str, size: int, **more: Any) -> Any:
    """A tiny config of an architecture."""
    from transformers.models.auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**SHARED | {"vocab_size": size} | more)


def bpe(split: str) -> Any:
    """A byte-level tokenizer of a few merges, which splits as llama.cpp's rules of this name do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    expression = next(regex for regex, name in SPLITS.items() if name == split)
    found = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    found.pre_tokenizer = pre_tokenizers.Sequence(parts)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(["what is this ? the dog and the cat 12 345"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_decoder(folder: Path, config: Any, tokenizer: Any) -> Path:
    """A random decoder, biases too, with its tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Merges of an image and an audio specialist: of a decoder like Llama 3's, and one like Qwen2's."""
    root = tmp_path_factory.mktemp("merges")
    found = {}
    for name, kind, split, more in (
        ("llama3", "llama", "llama-bpe", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
        ("qwen2", "qwen2", "qwen2", {"tie_word_embeddings": True}),
    ):
        base = write_decoder(root / name / "base", config_of(kind, 320, **more), bpe(split))
        found[name] = write_omni(root / name, base)
    return found


@pytest.fixture(scope="module")
def exported(merges: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from modalloy.export.llama_cpp import export

    root = tmp_path_factory.mktemp("exported")
    for name, folder in merges.items():
        export(folder, root / name, kind="f32")
    return {name: root / name for name in merges}


@pytest.fixture(scope="module")
def torches(merges: dict[str, Path]) -> dict[str, ChatModel]:
    return {name: load_model(folder) for name, folder in merges.items()}


@pytest.fixture(scope="module")
def llamas(exported: dict[str, Path]) -> dict[str, LlamaChat]:
    return {name: load_exported(folder, exact=True, sequences=3) for name, folder in exported.items()}


def logits(chat: LlamaChat, prompt: Any) -> list[np.ndarray]:
    """Logits (tokens, vocabulary) of each chunk of a prompt."""
    chat.sequences.clear()
    found = []
    for chunk in chunks(chat, prompt):
        count = len(chunk.inputs)
        found.append(
            chat.decoder.run(chunk.owner, chunk.inputs, range(chunk.begin, chunk.end), [0] * count, [True] * count)
        )
    chat.decoder.forget(0)
    return found


MESSAGES = {
    "text": user_message(QUESTION, []),
    "image and audio": user_message(QUESTION, [("image", PICTURE), ("audio", SOUND), ("image", PICTURE)]),
}


@needs_llama_cpp
@pytest.mark.parametrize("shown", MESSAGES)
@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_every_chunk_has_pytorchs_logits(
    name: str, shown: str, torches: dict[str, ChatModel], llamas: dict[str, LlamaChat]
) -> None:
    prompt = torches[name].prompt(MESSAGES[shown])
    with torch.no_grad():
        wanted = torches[name].model(**torches[name].inputs([prompt])).logits[0].numpy()
    found, at = logits(llamas[name], prompt), 0
    assert len(found) == (1 if shown == "text" else 7)
    for own in found:
        assert np.abs(own - wanted[at : at + len(own)]).max() < CLOSE * np.abs(wanted).max()
        at += len(own)
    assert at == len(wanted)


@needs_llama_cpp
def test_with_two_adapters_swapped_the_media_mean_something_else(
    exported: dict[str, Path], torches: dict[str, ChatModel], llamas: dict[str, LlamaChat], tmp_path: Path
) -> None:
    prompt = torches["llama3"].prompt(MESSAGES["image and audio"])
    right = np.concatenate(logits(llamas["llama3"], prompt))
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for path in exported["llama3"].iterdir():
        (swapped / path.name).symlink_to(path)
    content = json.loads((exported["llama3"] / "config.json").read_text())
    adapters = content[LLAMA_CPP]["adapters"]
    adapters["image"], adapters["audio"] = adapters["audio"], adapters["image"]
    for path in swapped.iterdir():  # which may not lead out of their folder
        target = path.resolve()
        path.unlink()
        os.link(target, path)
    (swapped / "config.json").unlink()
    (swapped / "config.json").write_text(json.dumps(content))
    chat = load_exported(swapped, exact=True)
    wrong = np.concatenate(logits(chat, prompt))
    first = prompt.owners.index(next(one for one in prompt.owners if one))
    assert np.allclose(wrong[:first], right[:first])
    assert np.abs(wrong - right)[first:].max(-1).min() > 100 * CLOSE * np.abs(right).max()
    assert (wrong.argmax(-1) != right.argmax(-1)).any()


@needs_llama_cpp
@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_answers_likelihoods_and_predictions_are_pytorchs(
    name: str, torches: dict[str, ChatModel], llamas: dict[str, LlamaChat]
) -> None:
    ours, theirs = llamas[name], torches[name]
    for messages in MESSAGES.values():
        pieces: list[str] = []
        got = ours.reply(messages, max_new_tokens=8, on_text=pieces.append)
        wanted = theirs.reply(messages, max_new_tokens=8)
        assert got == wanted and "".join(pieces) == got.answer
        options = ["the dog", "cat", "the cat 12"]
        assert ours.score_options(messages, options) == pytest.approx(theirs.score_options(messages, options), rel=1e-3)
    prompts = [theirs.prompt(messages) for messages in MESSAGES.values()]
    pairs = zip(*(chat.expect(prompts, options[:2], [1, 1]) for chat in (ours, theirs)), strict=True)
    for (our_ids, our_nats), (ids, nats) in pairs:
        assert our_ids.tolist() == ids.tolist() and our_nats.tolist() == [
            pytest.approx(row, rel=1e-3, abs=1e-3) for row in nats.tolist()
        ]
    assert [text for text, _ in ours.generate(prompts, max_new_tokens=4)] == [
        theirs.generate([prompt], max_new_tokens=4)[0][0] for prompt in prompts
    ]
    assert ours.continuations(["the dog"], [[" and", " the"]])[0] == pytest.approx(
        theirs.continuations(["the dog"], [[" and", " the"]])[0], rel=1e-3
    )


@needs_llama_cpp
def test_a_second_turn_goes_on_where_the_first_ended(
    llamas: dict[str, LlamaChat], torches: dict[str, ChatModel]
) -> None:
    chat = llamas["llama3"]
    chat.sequences.clear()
    first = MESSAGES["image and audio"]
    answer = chat.reply(first, max_new_tokens=6).answer
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "the cat ?"}]
    prompt = chat.prompt(second)
    _, place, reused = chat.sequences._placed(prompt)
    place.taken = False
    assert reused >= len(chat.prompt(first).ids)
    assert chat.reply(second, max_new_tokens=6).answer == torches["llama3"].reply(second, max_new_tokens=6).answer


@needs_llama_cpp
def test_a_server_answers_several_at_once(llamas: dict[str, LlamaChat], torches: dict[str, ChatModel]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    parts = [(text(QUESTION),), (image(PICTURE), text(QUESTION)), (sound(SOUND), text("the cat ?"))]
    alone = [
        torches["qwen2"].reply(message, max_new_tokens=8).answer
        for message in (
            user_message(QUESTION, []),
            user_message(QUESTION, [("image", PICTURE)]),
            user_message("the cat ?", [("audio", SOUND)]),
        )
    ]
    llamas["qwen2"].sequences.clear()
    with site({"merged": llamas["qwen2"]}) as server, ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda own: server.chat(*own, max_tokens=8), parts))
        assert [one[0] for one in done] == [200] * 3
        assert [one[2]["choices"][0]["message"]["content"] for one in done] == alone
        again = server.chat(*parts[1], max_tokens=8)[2]
        assert again["modalloy"]["reused_tokens"] > 0 and again["choices"][0]["message"]["content"] == alone[1]
        streamed = server.chat(*parts[0], max_tokens=8, stream=True)[2].decode()
        assert "data: [DONE]" in streamed


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 64}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"rope_parameters": YARN}),
    ],
)
def test_other_decoders_have_pytorchs_logits(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from modalloy.export.tokens import check_tokenizer, write_tokenizer
    from modalloy.llamacpp.decoder import Decoder

    tokenizer = bpe("qwen2")
    folder = write_decoder(tmp_path / "base", config_of(kind, 320, **more), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tied = model.config.tie_word_embeddings
    state = {name: one for name, one in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    weights = {name: Stored(lambda one=one: one, one.dtype, tuple(one.shape)) for name, one in state.items()}
    geometry = Geometry(model.config)
    assert geometry.context == (64 if kind == "mistral" else 512)
    file = tmp_path / "base.gguf"
    write_base(file, geometry, weights, "f32", lambda writer: write_tokenizer(writer, folder, tokenizer, 320))
    check_tokenizer(file, tokenizer)
    ids = [3 + place * 7 % 300 for place in range(60)]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    decoder = Decoder(file, {"text": None}, context=128, exact=True)
    got = decoder.run("text", ids, range(60), [0] * 60, [True] * 60)
    assert np.abs(got - wanted).max() < CLOSE * np.abs(wanted).max()
    decoder.close()


@needs_llama_cpp
def test_a_users_own_gguf_is_taken_if_it_is_the_bases(
    merges: dict[str, Path], exported: dict[str, Path], torches: dict[str, ChatModel], tmp_path: Path
) -> None:
    from modalloy.export.llama_cpp import export

    own = exported["llama3"] / "base-f32.gguf"
    export(merges["llama3"], tmp_path / "own", gguf=own)
    chat = load_exported(tmp_path / "own", exact=True)
    messages = MESSAGES["image and audio"]
    assert chat.reply(messages, max_new_tokens=8) == torches["llama3"].reply(messages, max_new_tokens=8)
    with pytest.raises(
        CheckpointError, match=r"not the base of this merge: its general.architecture is .llama., not .qwen2."
    ):
        export(merges["qwen2"], tmp_path / "wrong", gguf=own)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(own.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"is no GGUF that can be read"):
        export(merges["llama3"], tmp_path / "wrong", gguf=damaged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.gguf", "own"]


def changed(folder: Path, out: Path, change: Any) -> Path:
    """A copy of a merge whose config.json was changed."""
    out.mkdir()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "config.json":
            (out / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, out / path.relative_to(folder))
        elif path.is_file():
            (out / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (out / path.relative_to(folder)).write_text(path.read_text())
    content = json.loads((out / "config.json").read_text())
    change(content)
    (out / "config.json").write_text(json.dumps(content))
    return out


@needs_llama_cpp
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act gelu"),
        (
            lambda c: c.update(text_config=c["text_config"] | {"model_type": "gemma"}),
            "a gemma decoder: routing in llama.cpp is known for llama",
        ),
        (lambda c: c["modalities"]["image"]["update"].update(rank=0), "the update of image has rank 0"),
        (
            lambda c: c.update(text_linears=["model.layers.0.mlp.up_proj.weight"]),
            "text uses a dense matrix of its own in 1 weights",
        ),
        (lambda c: c.update(folded=True), "its text update is folded"),
        (
            lambda c: c["text_config"].update(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "rope_type dynamic",
        ),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(
    change: Any, line: str, merges: dict[str, Path], tmp_path: Path
) -> None:
    from modalloy.export.llama_cpp import export

    folder = changed(merges["llama3"], tmp_path / "odd", change)
    with pytest.raises(CheckpointError, match=line):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@needs_llama_cpp
def test_unknown_tokenizers_and_other_types_are_refused(base: Path, merges: dict[str, Path], tmp_path: Path) -> None:
    from modalloy.export.llama_cpp import export

    omni = write_omni(tmp_path, base)  # whose tokenizer knows whole words only
    with pytest.raises(CheckpointError, match=r"rules for its tokenizer are not known here; give the base's GGUF"):
        export(omni, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"--type q4_k: is not written; .*--gguf BASE.gguf"):
        export(merges["llama3"], tmp_path / "out", kind="q4_k")
    with pytest.raises(CheckpointError, match=r"rows of 48 numbers cannot be held in q8_0"):
        export(merges["llama3"], tmp_path / "out", kind="q8_0")
    with pytest.raises(CheckpointError, match=r"is no merge of output.form: omni"):
        export(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_llama_cpp
def test_engines_and_folders_that_do_not_go_together(
    merges: dict[str, Path], exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"is an export for llama.cpp; open it with --engine llama.cpp"):
        load_model(exported["llama3"])
    with pytest.raises(CheckpointError, match=r"is no export for llama.cpp; make one with `modalloy export"):
        load_exported(merges["llama3"])
    odd = changed(exported["llama3"], tmp_path / "odd", lambda c: c[LLAMA_CPP].update(base="../base.gguf"))
    with pytest.raises(CheckpointError, match=r"its entry modalloy_llama_cpp is damaged"):
        load_exported(odd)
    gone = changed(exported["llama3"], tmp_path / "gone", lambda c: c[LLAMA_CPP].update(base="other.gguf"))
    with pytest.raises(CheckpointError, match=r"other.gguf: no such file"):
        load_exported(gone)
    broken = changed(exported["llama3"], tmp_path / "broken", lambda c: None)
    (broken / "lora-image.gguf").unlink()
    (broken / "lora-image.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"lora-image.gguf: llama.cpp cannot load it for this base"):
        load_exported(broken)
    from modalloy.llamacpp import decoder
    from modalloy.machine.memory import Room

    monkeypatch.setattr(decoder, "room", lambda: Room(1000, "this machine"))
    with pytest.raises(OutOfMemoryError, match=r"take 0.0 GB, and this machine leaves 0.0 GB; export with --type q8_0"):
        load_exported(exported["llama3"])


@needs_llama_cpp
def test_another_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from modalloy.llamacpp import binding

    monkeypatch.setattr(binding, "load", binding.load.__wrapped__)
    library = binding._library()
    for place, line in ((_ctypes.__file__, "it has no llama_"), ("/nowhere/libllama.so", "cannot open")):
        monkeypatch.setenv(binding.LIBRARY, place)
        with pytest.raises(
            CheckpointError, match=f"is not the llama.cpp that this version of modalloy is for .*{line}"
        ):
            binding.load()
    monkeypatch.setenv(binding.LIBRARY, str(library))
    for missing in ("n_rs_seq", "n_outputs_max", "load_mode", "yarn_orig_ctx", "cb_eval", "no_perf"):
        name = "llama_model_default_params" if missing == "load_mode" else "llama_context_default_params"
        whole = binding.FUNCTIONS[name][0]
        fields = [one for one in whole._fields_ if one[0] != missing]
        with monkeypatch.context() as other:
            other.setitem(binding.DEFAULTS, name, {k: v for k, v in binding.DEFAULTS[name].items() if k != missing})
            other.setitem(binding.FUNCTIONS, name, (type("Shorter", (binding.c.Structure,), {"_fields_": fields}), []))
            with pytest.raises(CheckpointError, match=rf"{name} gives \w+ = \S+, not"):
                binding.load()
    with monkeypatch.context() as other:
        other.setitem(binding.SIZES, "llama_context_default_params", 160)
        with pytest.raises(CheckpointError, match=r"llama_context_default_params gives 168 bytes instead of 160"):
            binding.load()
    monkeypatch.delenv(binding.LIBRARY)
    monkeypatch.setattr(binding, "version", lambda name: "2025.1.1")
    with pytest.raises(CheckpointError, match=r"xllamacpp 2025.1.1 is installed, and this version of modalloy is for"):
        binding.load()
    monkeypatch.setattr(binding, "find_spec", lambda name: None)
    with pytest.raises(
        ModalloyError, match=r'xllamacpp is not installed, and this needs it; run pip install "modalloy\[llamacpp\]"'
    ):
        binding.load()


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["modalloy", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@needs_llama_cpp
def test_the_commands(
    merges: dict[str, Path], torches: dict[str, ChatModel], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "llama"
    code, said, error = run(capsys, monkeypatch, "export", str(merges["llama3"]), "--to", "llama.cpp", "-o", str(out))
    assert (code, error) == (0, "") and "base     base-f16.gguf" in said
    ask = ["chat", str(out), "--engine", "llama.cpp", "--image", str(PICTURE), "-p", QUESTION, "--max-new-tokens", "6"]
    code, said, error = run(capsys, monkeypatch, *ask)
    assert (code, error) == (0, "") and isinstance(said, str)
    for more, line in (
        (["--quantize", "int8"], "--quantize: llama.cpp runs on the CPU here"),
        (["--dtype", "float16"], "--dtype: llama.cpp runs on the CPU here"),
        (["--device", "cuda"], "--device cuda: llama.cpp runs on the CPU here"),
    ):
        code, _, error = run(capsys, monkeypatch, *ask, *more)
        assert code == 2 and line in error and error.count("\n") == 1
    code, _, error = run(capsys, monkeypatch, "chat", str(merges["llama3"]), "-p", "x", "--context", "64")
    assert code == 2 and "--context: is of llama.cpp's cache" in error
    code, _, error = run(capsys, monkeypatch, "export", str(merges["llama3"]), "--to", "llama.cpp", "-o", str(out))
    assert code == 2 and "already exists" in error
    code, _, error = run(capsys, monkeypatch, "export", str(out), "--to", "onnx", "-o", str(tmp_path / "x"))
    assert code == 2 and "--to onnx: not a to; known: llama.cpp, transformers, vllm" in error
    code, _, error = run(
        capsys, monkeypatch, "chat", str(out), "--engine", "llama.cpp", "--context", "16", "-p", QUESTION
    )
    assert code == 2 and "more than the cache's 16" in error


ALONE = """
import json, sys
sys.modules["modalloy"] = None
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline
folder, *messages = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
found = []
for turns in map(json.loads, messages):
    inputs = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
    with torch.no_grad():
        last = model(**inputs).logits[0, -1].tolist()
    beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
    found.append({"ids": inputs["input_ids"][0].tolist(), "last": last, "answer": ids, "beams": beams[0].tolist()})
asked = pipeline("any-to-any", model=model, processor=processor)
piped = asked(text=json.loads(messages[-1]), max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})
assert sys.modules["modalloy"] is None
print(json.dumps({"found": found, "piped": piped[0]["generated_text"], "class": type(model).__name__}))
"""


@pytest.fixture(scope="module")
def portable(merges: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("portable") / "qwen2"
    export_transformers(merges["qwen2"], out)
    return out


def told(messages: Any) -> Any:
    """Messages as JSON holds them."""
    return json.loads(json.dumps(messages, default=str))


def test_transformers_loads_it_without_us(portable: Path, torches: dict[str, ChatModel], tmp_path: Path) -> None:
    """A process in which the package cannot be imported: the same logits, answers and beams; a pipeline; a data URL."""
    chat, shown = torches["qwen2"], [told(one) for one in MESSAGES.values()]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(portable), *map(json.dumps, shown)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    tokens = json.loads((portable / "config.json").read_text())["modalities"]
    for messages, got in zip(MESSAGES.values(), said["found"], strict=True):
        prompt = chat.prompt(messages)
        names = chat.processor.owners
        places = [tokens[names[owner]]["token_id"] if owner else None for owner in prompt.owners]
        assert got["ids"] == [one if place is None else place for one, place in zip(prompt.ids, places, strict=True)]
        inputs = chat.inputs([prompt])
        with torch.no_grad():
            wanted = chat.model(**inputs).logits[0, -1]
        assert torch.allclose(torch.tensor(got["last"]), wanted, atol=1e-4)
        greedy = chat.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(prompt.ids) :].tolist()
        assert got["answer"] == greedy
        beams = chat.model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
        assert got["beams"][len(prompt.ids) :] == beams[0, len(prompt.ids) :].tolist()
    assert said["class"] == "RoutedForConditionalGeneration"
    assert said["piped"].strip() == chat.processor.answer(torch.tensor(said["found"][-1]["answer"]))


def test_its_files_import_each_other_only(portable: Path) -> None:
    files = {path.stem: path.read_text() for path in portable.glob("*.py")}
    assert len(files) > 10
    for name, content in files.items():
        assert "from modalloy" not in content and "import modalloy" not in content, name
        compile(content, name, "exec")
    done = subprocess.run(
        [sys.executable, "-m", "modalloy.cli", "chat", str(portable), "-p", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "needs code of its own" in done.stderr


def test_a_bundle_has_what_is_named_and_no_more() -> None:
    texts = {
        "modalloy.one": '"""One."""\nfrom modalloy.two import f as g, h\n\n# how many\nN = 3\n\ndef used():\n    return g(N)\n',
        "modalloy.two": '"""Two."""\nimport os, sys\n\ndef f(n):\n    return k(n)\n\ndef h():\n    return os\n\n'
        "def k(n):\n    return sys, n\n",
    }
    found = bundle("modalloy.one", texts)
    assert found.keys() == {"modalloy_one", "modalloy_two"}
    assert "from .modalloy_two import f as g" in found["modalloy_one"] and "# how many" in found["modalloy_one"]


def test_transformers_serve_serves_it(portable: Path, torches: dict[str, ChatModel], tmp_path: Path) -> None:
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseGenerateManager, Modality

    assert BaseGenerateManager
    manager = ModelManager(device="cpu", dtype="float32", trust_remote_code=True, model_timeout=-1)
    model, processor = manager.load_model_and_processor(manager.process_model_name(str(portable)))
    assert manager.get_model_modality(model, processor) is Modality.MULTIMODAL
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "url": image(PICTURE)["image_url"]["url"]}, text(QUESTION)]}],
        add_generation_prompt=True,
        tools=None,
        return_tensors="pt",
        return_dict=True,
        tokenize=True,
        load_audio_from_video=False,
    )
    ids = model.generate(**inputs.to(model.device), max_new_tokens=6, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    wanted = torches["qwen2"].reply(user_message(QUESTION, [("image", PICTURE)]), max_new_tokens=6)
    assert processor.decode(ids, skip_special_tokens=True).strip() == wanted.answer


def test_vllm_is_given_what_it_can_say(merges: dict[str, Path], base: Path, tmp_path: Path) -> None:
    from tiny_inputs import write_recipe

    import modalloy

    with pytest.raises(
        CheckpointError, match=r"the tokens of .*image.* use weights of their own, and vLLM gives one LoRA to all"
    ):
        export_vllm(merges["qwen2"], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has neither config.json nor adapter_config.json"):
        export_vllm(tmp_path, tmp_path / "out")
    recipe = write_recipe(tmp_path / "inputs")
    modalloy.merge(recipe, tmp_path / "full")
    whole = export_vllm(tmp_path / "full", tmp_path / "whole")
    assert whole["command"] == f"vllm serve {tmp_path / 'whole'}"
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "whole").iterdir()}
    recipe.write_text(recipe.read_text().replace("form: full", "form: adapter"))
    modalloy.merge(recipe, tmp_path / "adapter")
    lora = export_vllm(tmp_path / "adapter", tmp_path / "lora")
    assert "--enable-lora --max-lora-rank 8 --lora-modules merged=" in lora["command"]
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    assert "--default-mm-loras" not in lora["command"]
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(content | {"r": 1024}))
    with pytest.raises(CheckpointError, match=r"its LoRA has rank 1024, and vLLM takes 1 to 512"):
        export_vllm(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_splits_are_those_of_the_published_tokenizers() -> None:
    assert set(SPLITS.values()) == {"qwen2", "llama-bpe"} and all(one.startswith(CONTRACTIONS) for one in SPLITS)
