"""Model folders of strangers: no code of their own is run, and every fault is one line that names the folder."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_omni
from safetensors.torch import load_file, save_file

import modalloy
from modalloy import cli
from modalloy.errors import CheckpointError
from modalloy.model.ends import Ends
from modalloy.model.opening import check_code, opening

Change = Callable[[Path], Any]


def edit(name: str, **entries: Any) -> Change:
    """Sets entries of a JSON file of the folder."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | entries))

    return change


def put(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


CODE = {
    "tokenizer": edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Slow", None]}),
    "old tokenizer": edit("tokenizer_config.json", auto_map=["evil.Slow", "evil.Fast"]),
    "config": edit("config.json", auto_map={"AutoConfig": "evil.EvilConfig"}),
    "model": edit("config.json", auto_map={"AutoModelForCausalLM": "somebody/repo--evil.Model"}),
    "part of a config": edit("config.json", text_config={"auto_map": {"AutoConfig": "evil.EvilConfig"}}),
    "processor": edit("processor_config.json", auto_map={"AutoProcessor": "evil.P"}),
    "pictures": edit("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.P"}),
    "attention": edit("config.json", _attn_implementation="somebody/attention"),
    "attention of a part": edit("config.json", attn_implementation={"text_config": "somebody/attention@main:f"}),
    "experts": edit("config.json", experts_implementation="somebody/experts"),
    "generation": edit("generation_config.json", custom_generate="somebody/generate"),
}


@pytest.mark.parametrize("name", CODE)
def test_code_of_a_folder_is_never_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    CODE[name](folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match=r"needs code of its own|code that would be fetched"):
        modalloy.load_model(folder)
    assert not ran.exists()


def test_an_auto_map_of_classes_that_transformers_has_is_no_code(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})(tmp_path / "model")
    check_code(tmp_path / "model")


DAMAGED = {
    "tokenizer of another type": put("tokenizer.json", b"[]"),
    "tokenizer without a model": put("tokenizer.json", b"{}"),
    "tokenizer that is no text": put("tokenizer.json", b"\xff\xfe\x00"),
    "tokenizer of an unknown kind": edit("tokenizer.json", model={"type": "Riddle"}),
    "tokenizer config": edit("tokenizer_config.json", eos_token=[1], tokenizer_class=7),
    "special tokens": edit("tokenizer_config.json", added_tokens_decoder={"x": 1}),
    "template": edit("tokenizer_config.json", chat_template=7),
    "sizes": edit("config.json", num_attention_heads=0),
    "sizes that are texts": edit("config.json", hidden_size="32"),
    "activation": edit("config.json", hidden_act="riddle"),
    "rope": edit("config.json", rope_parameters={"rope_type": "riddle", "rope_theta": "x"}),
    "more layers than weights": edit("config.json", num_hidden_layers=4),
    "ends": edit("generation_config.json", eos_token_id=["</s>"]),
    "stop strings": edit("generation_config.json", stop_strings=[7]),
    "generation": put("generation_config.json", b"[1]"),
    "token beyond the vocabulary": put("chat_template.jinja", b"{{ bos_token }} <late> {{ messages[0].content }}"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    if name == "template":
        (folder / "chat_template.jinja").unlink()
    if name.startswith("token beyond"):
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"].append(content["added_tokens"][-1] | {"id": 99, "content": "<late>"})
        content["model"]["vocab"]["<late>"] = 99
        (folder / "tokenizer.json").write_text(json.dumps(content))
    DAMAGED[name](folder)
    monkeypatch.setattr(sys, "argv", ["modalloy", "chat", str(folder), "-p", "what is this ?", "--max-new-tokens", "2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("error: ") and str(folder) in err and len(err) < 1000


def test_damaged_entries_of_an_omni_folder_are_one_line(base: Path, tmp_path: Path) -> None:
    folder = write_omni(tmp_path, base)
    for name in ("config.json", "processor_config.json"):
        whole = (folder / name).read_text()
        for change in (
            {"modalities": []},
            {"modalities": {"image": {}}},
            {"modalities": json.loads(whole)["modalities"] | {"audio": 1}},
        ):
            (folder / name).write_text(json.dumps(json.loads(whole) | change))
            with pytest.raises(CheckpointError, match=rf"{name}: is not what `modalloy merge` wrote"):
                modalloy.load_model(folder)
        (folder / name).write_text(whole)


def test_bugs_of_ours_pass_the_boundary() -> None:
    with pytest.raises(CheckpointError, match="here: its model cannot be opened"), opening("here", "model"):
        json.loads("{")
    with pytest.raises(ValueError, match="of ours"), opening("here", "model"):
        raise_here()
    with pytest.raises(KeyboardInterrupt), opening("here", "model"):
        raise KeyboardInterrupt


def raise_here() -> None:
    """Raises as a line of the package would."""
    exec(compile("raise ValueError('of ours')", modalloy.__file__, "exec"))


def test_an_empty_question_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["modalloy", "chat", "anything", "-p", "  "])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith("error: -p: the question is empty")


def test_answers_end_at_the_first_end_token_or_stop_string() -> None:
    ends = Ends((1, 3), ("\nUser:", "END"), "</s>")
    assert [ends.kept(ids) for ids in ([5, 3, 1], [1], [5, 6], [])] == [1, 0, 2, 0]
    assert ends.cut("a dog END of\nUser: b") == "a dog " and ends.cut("a dog") == "a dog"


TURNS = {
    "{% for m in messages %}{{ m.role }} : {{ m.content }}</s>{% endfor %}": ((2,), ()),
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <s> {% endfor %}": ((1, 2), ()),
    "{% for m in messages %}\n### {{ m.role }}: {{ m.content }}{% endfor %}": ((2,), ("### user:",)),
    "{% for m in messages %}{{ m.content }}\n{% endfor %}": ((2,), ()),
    "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}": ((2,), ()),
}


@pytest.mark.parametrize("template", TURNS)
def test_the_template_tells_where_an_answer_ends(base: Path, tmp_path: Path, template: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template)
    tokens, strings = TURNS[template]
    ends = modalloy.load_model(folder).ends
    assert (tuple(sorted(ends.tokens)), ends.strings) == (tokens, strings)
    edit("generation_config.json", eos_token_id=[2, 9], stop_strings=["dog"])(folder)
    edit("config.json", eos_token_id=8)(folder)
    chat = modalloy.load_model(folder)
    assert set(chat.ends.tokens) == {*tokens, 9, 8} and chat.ends.strings == ("dog", *strings)
    said: list[str] = []
    reply = chat.reply([{"role": "user", "content": "what ?"}], max_new_tokens=6, on_text=said.append)
    assert "".join(said).strip() == reply.answer and "dog" not in reply.answer


def full(tmp_path: Path, models: dict[str, Change], base: Path, **output: Any) -> Path:
    """A full merge of copies of the base that were changed."""
    for name, change in models.items():
        shutil.copytree(base, tmp_path / name, dirs_exist_ok=True)
        if name != "base":
            weights = load_file(base / "model.safetensors")
            save_file({key: tensor * 1.01 for key, tensor in weights.items()}, tmp_path / name / "model.safetensors")
        change(tmp_path / name)
    recipe = {
        "base_model": str(tmp_path / "base") if "base" in models else str(base),
        "merge_method": "average",
        "models": [{"model": str(tmp_path / name)} for name in models if name != "base"],
        "output": {"form": "full"} | output,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    modalloy.merge(tmp_path / "recipe.yaml", tmp_path / "out", overwrite=(tmp_path / "out").exists())
    return tmp_path / "out"


def test_the_specialists_shared_template_reaches_a_full_result(base: Path, tmp_path: Path) -> None:
    def bare(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()

    def listed(folder: Path) -> None:
        bare(folder)
        edit(
            "tokenizer_config.json",
            chat_template=[{"name": "default", "template": "T"}, {"name": "x", "template": "X"}],
        )(folder)

    out = full(tmp_path, {"base": bare, "a": put("chat_template.jinja", b"T"), "b": listed}, base)
    assert (out / "chat_template.jinja").read_text() == "T"
    changes = {"a": put("chat_template.jinja", b"T"), "b": put("chat_template.jinja", b"U")}
    with pytest.raises(CheckpointError, match="different chat templates"):
        full(tmp_path, changes, base)
    out = full(tmp_path, changes | {"base": put("chat_template.jinja", b"B")}, base, chat_template="base")
    assert (out / "chat_template.jinja").read_text() == "B"


def test_code_and_tokenizer_files_of_the_base_reach_a_full_result(base: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("import os\n")

    def coded(folder: Path) -> None:
        edit("config.json", auto_map={"AutoConfig": "conf_toy.C", "AutoModel": "other/repo--away.M"})(folder)
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["tok_toy.T", None]})(folder)
        (folder / "conf_toy.py").write_text(f"from .parts_toy import x\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
        for name in ("parts_toy.py", "tok_toy.py", "unnamed.py", "away.py", "toy.tiktoken"):
            (folder / name).write_text("x = 1\n")

    out = full(tmp_path, {"base": coded, "a": lambda _: None, "b": lambda _: None}, base)
    assert {path.name for path in out.glob("*.py")} == {"conf_toy.py", "parts_toy.py", "tok_toy.py"}
    assert (out / "toy.tiktoken").read_text() == "x = 1\n" and not (tmp_path / "ran").exists()

    def linked(folder: Path) -> None:
        coded(folder)
        (folder / "tok_toy.py").unlink()
        (folder / "tok_toy.py").symlink_to(secret)

    with pytest.raises(CheckpointError, match=r"tok_toy\.py: is a link out of the model's folder"):
        full(tmp_path, {"base": linked, "a": lambda _: None}, base)


def test_tokens_that_the_base_lacks_are_said(base: Path, tmp_path: Path) -> None:
    added = {"3": {"content": "<|call|>", "special": True}}
    change = edit("tokenizer_config.json", added_tokens_decoder=added)
    full(tmp_path, {"a": change, "b": lambda _: None}, base)
    notices = modalloy.plan(modalloy.load_recipe(tmp_path / "recipe.yaml")).notices
    assert len(notices) == 1 and "1 tokens that the base's lacks (<|call|>)" in notices[0]
