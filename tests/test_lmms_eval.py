"""The adapter to lmms-eval against a stand-in of its interface; its own pins conflict with ours."""

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from modalloy.errors import MediaError, ModalloyError
from modalloy.evals import BENCHMARKS
from modalloy.evals.adapters.lmms_eval import TASKS, export, manifest
from modalloy.evals.adapters.lmms_eval.tasks import utils
from modalloy.evals.benchmark import Answer, Sample

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
QUESTION = {"from": "human", "value": "Image: <image>\nAudio: <audio>\nWhat do they share?\nA. colour\nB. sound"}


@dataclass(frozen=True)
class ModelManifest:
    """lmms-eval's, as far as it is used."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


class Model:
    """lmms-eval's `lmms`, as far as it is used."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "modalloy.evals.adapters.lmms_eval.model", raising=False)


class Chat:
    """Answers with the question's last word and what it was shown."""

    modalities = ("image", "audio", "video", "point")

    def chat(self, messages: list[dict[str, Any]], *, max_new_tokens: int) -> str:
        self.asked = messages, max_new_tokens
        if any(part.get("path") == "broken.png" for part in messages[0]["content"]):
            raise MediaError("broken.png: cannot be read")
        return "B. sound\nmore"


@pytest.fixture
def model(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The class that the manifest names, loading nothing."""
    monkeypatch.setattr("modalloy.model.load_model", lambda *given, **options: Chat())
    module, _, name = manifest().chat_class_path.rpartition(".")
    __import__(module)
    found: Callable[..., Any] = getattr(sys.modules[module], name)
    return found


def request(*args: Any) -> Any:
    return types.SimpleNamespace(args=args)


def test_lmms_eval_finds_the_model(stand_in: None, model: Callable[..., Any]) -> None:
    (line,) = (line for line in PROJECT.read_text().splitlines() if line.startswith('modalloy = "modalloy.evals'))
    point = EntryPoint("modalloy", line.partition('"')[2].rstrip('"'), "lmms_eval.models")
    assert point.load()() == ModelManifest("modalloy", None, "modalloy.evals.adapters.lmms_eval.model.ModalloyChat")
    assert issubclass(model, Model) and not model.is_simple  # type: ignore[arg-type, attr-defined]


def test_a_task_is_answered(model: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"id": "q1", "conversations": [QUESTION, {"from": "gpt", "value": None}], "modal_inputs": media()}]
    answers = [{"id": "q1", "conversations": [QUESTION, {"from": "gpt", "value": "B"}]}]
    (tmp_path / "MCUB-4.json").write_text(json.dumps(rows))
    (tmp_path / "MCUB-answer.json").write_text(json.dumps(answers))
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    (doc,) = map(json.loads, export("mcub4", tmp_path, tmp_path).read_text().splitlines())
    assert doc["task"] == "mcub4" and Path(doc["media"][0][1]) == tmp_path / "cat.png"

    asked = model("out", device="cpu", batch_size="1", max_batch_size=64)
    asked.task_dict = {"modalloy_mcub4": {"test": [doc]}}
    options = {"max_new_tokens": 16, "do_sample": False, "until": ["\n"]}
    (text,) = asked.generate_until(
        [request(utils.doc_to_text(doc), utils.doc_to_messages, options, 0, "modalloy_mcub4", "test")]
    )
    assert text == "B. sound"
    messages, limit = asked.chat.asked
    assert limit == 16 and messages == [
        {
            "role": "user",
            "content": [  # media stand where the question names them
                {"type": "text", "text": "Image: "},
                {"type": "image", "path": str(tmp_path / "cat.png"), "inline": True},
                {"type": "text", "text": "\nAudio: "},
                {"type": "audio", "path": str(tmp_path / "dog.wav"), "inline": True},
                {"type": "text", "text": "\nWhat do they share?\nA. colour\nB. sound"},
            ],
        }
    ]
    assert utils.process_results(doc, [text]) == {"compose": 1.0, "robust": 1.0}
    assert utils.process_results(doc, [" The answer is B. "]) == {"compose": 0.0, "robust": 1.0}


def media() -> dict[str, list[str]]:
    return {"vision": ["cat.png"], "audio": ["dog.wav"]}


def test_what_cannot_be_done_is_one_line(model: Callable[..., Any]) -> None:
    asked = model("out")
    asked.task_dict = {"t": {"test": [{}]}}

    def ask(medium: str, **options: Any) -> None:
        messages = [{"role": "user", "content": [{"type": "image", "url": medium}]}]
        asked.generate_until([request("", lambda doc: messages, options, 0, "t", "test")])

    with pytest.raises(ModalloyError, match=r"answers are decoded greedily, and t asks for .*; set do_sample: false"):
        ask("cat.png", do_sample=True)
    with pytest.raises(MediaError, match=r"broken\.png"):  # never an empty answer
        ask("broken.png", temperature=0)
    with pytest.raises(ModalloyError, match="questions are asked one at a time, not 8 at once"):
        model("out", batch_size=8)
    with pytest.raises(ModalloyError, match="likelihoods are not scored through lmms-eval"):
        asked.loglikelihood([])
    with pytest.raises(ModalloyError, match="tasks of several rounds are not supported"):
        asked.generate_until_multi_round([])


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_task_files_name_the_rules_of_their_benchmark(path: Path) -> None:
    class Loader(yaml.SafeLoader):
        """Reads `!function utils.NAME` as the function."""

    Loader.add_constructor("!function", lambda _, node: getattr(utils, node.value.removeprefix("utils.")))
    own = yaml.safe_load(path.read_text())
    task = yaml.load((TASKS / own.pop("include")).read_text(), Loader) | own
    assert task["task"] == f"modalloy_{path.stem}"
    assert task["dataset_kwargs"]["data_files"] == {task["test_split"]: f"{path.stem}.jsonl"}
    rules = BENCHMARKS[path.stem].rules
    assert [metric["metric"] for metric in task["metric_list"]] == list(rules)
    assert task["generation_kwargs"]["max_new_tokens"] == BENCHMARKS[path.stem].max_new_tokens
    sample = Sample(id="1", text="?", golds=("B",), choices=("a", "b"), group={"type": "x", "modality": "x"})
    doc = {"task": path.stem, **sample.to_dict()}
    scored = {name: float(rule(sample, Answer("B")).correct) for name, rule in rules.items()}
    assert task["process_results"](doc, ["B "]) == scored and doc[task["doc_to_target"]] == ["B"]
