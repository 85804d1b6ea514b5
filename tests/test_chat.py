"""`modalloy chat`: the order of media, the JSON document, and a conversation typed line by line."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import WORDS, write_omni
from PIL import Image

import modalloy
from modalloy import cli
from modalloy.errors import MediaError, ModalloyError
from modalloy.model.chat import ChatModel, user_message
from modalloy.model.session import Session

Answer = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A merged image and audio model with its media: dog.png, cat.png, my dog.png, dog.wav and broken.png."""
    folder = tmp_path_factory.mktemp("chat")
    write_omni(folder, base)
    for seed, name in enumerate(("dog", "cat", "my dog")):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    soundfile.write(folder / "dog.wav", np.sin(np.arange(8000) / 9), 16_000)
    (folder / "broken.png").write_bytes((folder / "dog.png").read_bytes()[:-40])
    return folder


@pytest.fixture(scope="module")
def model(omni: Path) -> ChatModel:
    """The merged model, with a quick encoder in the place of Whisper's, which would take most of the time."""
    model = modalloy.load_model(omni / "omni")
    model.model.encoders["audio"].forward = lambda mel: mel.reshape(len(mel), 4, -1)[..., :3840]
    return model


@pytest.fixture
def chat(
    omni: Path, model: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Runs `modalloy chat` in the folder of the media, with `typed` on its stdin; the model is loaded once for all tests."""
    monkeypatch.setattr("modalloy.model.load_model", lambda *_, **__: model)
    monkeypatch.chdir(omni)

    def run(*arguments: str, typed: Iterable[str] = ()) -> Answer:
        monkeypatch.setattr(sys, "argv", ["modalloy", "chat", "omni", "--max-new-tokens", "4", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


def asked(model: ChatModel, *turns: Any) -> str:
    """The answer to turns, each (question, (modality, file), …) or an answer."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += (
            [{"role": "assistant", "content": turn}] if isinstance(turn, str) else user_message(turn[0], turn[1:])
        )
    return model.chat(messages, max_new_tokens=4)


def test_media_keep_the_order_of_the_options(chat: Callable[..., Answer]) -> None:
    given = ("--audio", "dog.wav", "--image", "dog.png", "--media", "audio=dog.wav", "--media", "vision=cat.png")
    code, out, err = chat("-p", "are these the same ?", *given, "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    answer = json.loads(out)
    assert answer["prompt"] == ("<s>user : <audio>\n<image>\n<audio>\n<image>\nare these the same ?</s><s>assistant : ")
    assert answer["media"] == {"audio": ["dog.wav", "dog.wav"], "image": ["dog.png", "cat.png"]}
    assert answer["question"] == "are these the same ?" and answer["seconds"] > 0
    assert answer["tokens"] == {"text": 12, "image": 2 * (4 + 2), "audio": 2 * (4 + 2)}
    assert set(answer["answer"].split()) <= set(WORDS) and 1 <= answer["new_tokens"] <= 4
    turned = ("--media", "vision=cat.png", *given[:-2])
    assert json.loads(chat("-p", "?", *turned, "--json")[1])["prompt"].count("<image>\n<audio>\n<image>\n<audio>") == 1


def test_one_question_prints_the_answer_alone(chat: Callable[..., Answer], model: ChatModel) -> None:
    expected = asked(model, ("what is this ?", ("image", "dog.png"), ("audio", "dog.wav")))
    assert chat("-p", "what is this ?", "--image=dog.png", "--audio", "dog.wav") == (0, expected + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "no.png"], r"no\.png: no such file; check the path"),
        (["--image", "broken.png"], r"broken\.png: not a readable image"),
        (["--video", "dog.png"], r"this model takes no video input; it takes: image, audio"),
        (["--media", "depth=dog.png"], r"this model takes no depth input; it takes: image, audio"),
        (["--media", "dog.png"], r"--media dog\.png: not of the form NAME=FILE; write for example"),
        (["--device", "tpu"], r"--device tpu: not a device; known: auto, cpu, cuda"),
        (["--dtype", "int8"], r"--dtype int8: not a dtype; known: float32, bfloat16, float16, auto"),
        (
            ["--max-new-tokens", "600"],
            r"takes 11 tokens and the answer up to 600, more than the model's 512; show fewer",
        ),
    ],
)
def test_mistakes_end_with_code_2(chat: Callable[..., Answer], arguments: list[str], message: str) -> None:
    code, out, err = chat("-p", "what is this ?", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(rf"^error: .*{message}", err), err


def test_json_needs_a_question(chat: Callable[..., Answer]) -> None:
    assert chat("--json") == (2, "", "error: --json prints the answer to one question; ask it with -p\n")


def test_a_conversation(chat: Callable[..., Answer], model: ChatModel) -> None:
    """Files are given by option, command, quoted or escaped path; answers alone go to stdout; turns are kept."""
    typed = [
        "what is this ?",
        "/audio dog.wav",
        "'my dog.png' is dog.png the same ?",
        r"my\ dog.png",
        "/add cat.png dog.png",
        "yes ?",
    ]
    code, out, err = chat("--image", "cat.png", typed=typed)
    first = ("what is this ?", ("image", "cat.png"))
    one = asked(model, first)
    second = ("is the same ?", ("audio", "dog.wav"), ("image", "my dog.png"), ("image", "dog.png"))
    two = asked(model, first, one, second)
    third = ("yes ?", ("image", "my dog.png"), ("image", "cat.png"), ("image", "dog.png"))
    assert code == 0 and out == f"{one}\n{two}\n{asked(model, first, one, second, two, third)}\n"
    assert err.startswith("attached cat.png (image)\ntakes text, image, audio; /help lists the commands\n> > ")
    assert "attached my dog.png (image)\nattached dog.png (image)\n" in err


def test_mistakes_do_not_end_a_conversation(chat: Callable[..., Answer], model: ChatModel) -> None:
    mistakes = {
        "broken.png what is this ?": r"broken\.png: not a readable image",
        "/image no.png": r"no\.png: no such file; check the path",
        "is no.png a dog ?": r"no\.png: no such file; check the path",
        "/imag dog.png": r"no command /imag; did you mean '/image'\? known: /add, /audio, /clear, /exit, /help, /image",
        "/image": r"no file is named; write its path after the command",
        "/add recipe.yaml": r"recipe\.yaml: its ending tells no modality; put one of /image, /audio before it",
        "/add clip.mp4": r"clip\.mp4: no such file",
        "/add dog.png broken.png": r"broken\.png: not a readable image",
        "dog " * 600: r"the conversation takes \d+ tokens and the answer up to 4, more than the model's 512",
    }
    _, out, err = chat(typed=["yes ?", *mistakes, "no ?", "/clear", "yes ?", "/exit", "not asked"])
    one = asked(model, ("yes ?",))
    assert out == f"{one}\n{asked(model, ('yes ?',), one, ('no ?',))}\n{one}\n"
    errors = [line.partition("error: ")[2] for line in err.splitlines() if "error: " in line]
    for line, message in zip(errors, mistakes.values(), strict=True):
        assert re.match(message, line), (message, line)


def test_answers_are_streamed_word_by_word(model: ChatModel) -> None:
    written: list[str] = []
    session = Session(model, 8, write=written.append, say=lambda _: None)
    session.take("what do you hear ?")
    answer = model.chat(user_message("what do you hear ?", []), max_new_tokens=8)
    assert "".join(written) == answer + "\n" and len(written) == len(answer.split()) + 1


def test_an_interrupted_turn_is_forgotten(model: ChatModel) -> None:
    said: list[str] = []

    def interrupt(text: str) -> None:
        if text != "\n":
            raise KeyboardInterrupt

    session = Session(model, 4, write=interrupt, say=said.append)
    session.run(["what is this ?"])
    assert said[-1] == "stopped; this turn is forgotten" and session.turns == []


def test_a_modality_without_an_ending_has_a_command(model: ChatModel, omni: Path) -> None:
    session = Session(model, 4, say=lambda _: None)
    session.attach([("image", omni / "dog.png")])
    with pytest.raises(MediaError, match=r"dog\.png: this model takes no depth input; it takes: image, audio"):
        session.attach([(None, omni / "cat.png"), ("depth", omni / "dog.png")])
    assert session.attached == [{"type": "image", "path": omni / "dog.png"}]  # all or none
    with pytest.raises(ModalloyError, match="no command /depth"):
        session.take("/depth dog.png")
