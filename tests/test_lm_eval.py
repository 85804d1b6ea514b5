"""Our MMLU against lm-eval's on the same rows: what it gave is kept in a golden file; with lm-eval installed, it runs.

`python tests/test_lm_eval.py` writes the golden file again (pip install lm-eval==0.4.13).
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_text_evals import MMLU_TEST, mmlu_hub_rows, write_llama, write_mmlu

from modalloy.errors import ModalloyError
from modalloy.evals import BENCHMARKS
from modalloy.evals.ask import evaluate
from modalloy.evals.benchmark import Answer, Sample, Source
from modalloy.evals.scores import result
from modalloy.model import ChatModel, load_model

GOLDEN = Path(__file__).parent / "golden" / "mmlu_lm_eval.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def chat(llama: Path) -> ChatModel:
    return load_model(llama)


def ours(chat: ChatModel, folder: Path) -> list[tuple[Sample, Answer]]:
    samples = BENCHMARKS["mmlu"].samples(Source(write_mmlu(folder)))
    return [(s, Answer(likelihoods=tuple(chat.continuations([s.text], [s.options])[0]))) for s in samples]


def test_mmlu_is_what_lm_eval_gave(chat: ChatModel, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    rule, right = BENCHMARKS["mmlu"].rules["likelihood"], []
    answered = ours(chat, tmp_path)
    assert [sample.id for sample, _ in answered] == list(golden["rows"])
    for sample, answer in answered:
        theirs = golden["rows"][sample.id]
        assert hashlib.sha256(sample.text.encode()).hexdigest() == theirs["prompt_sha256"]
        assert answer.likelihoods == pytest.approx(theirs["likelihoods"], abs=2e-4)
        verdict = rule(sample, answer)
        assert verdict.prediction == "ABCD"[theirs["argmax"]]
        right.append(verdict.correct)
    assert sum(right) / len(right) == pytest.approx(golden["acc"])
    model = {"path": "llama", "fingerprint": "0" * 64, "recipe": None, "options": {}}
    run = evaluate(lambda: chat, model, BENCHMARKS["mmlu"], Source(tmp_path), tmp_path / "run", batch_size=3)
    scores = result(run)
    assert scores["acc"] == pytest.approx(golden["acc"]) and scores["n"] == 9
    assert {name: group["n"] for name, group in scores["groups"]["category"].items()} == {
        "STEM": 4,
        "humanities": 2,
        "other": 3,
    }
    assert len({row["argmax"] for row in golden["rows"].values()}) > 1 and 0 < golden["acc"] < 1


def test_an_option_is_tokenised_with_its_question(chat: ChatModel) -> None:
    """Alone, " A" is two tokens for a tokenizer that puts a space before every text, and one after a question."""
    tokenizer = chat.processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" A", add_special_tokens=False)) == ["▁", "▁A"]
    alone, after = chat.plain_prompt("Answer:").ids, tokenizer.encode("Answer: A")
    assert after == [*alone, tokenizer.convert_tokens_to_ids("▁A")]
    with torch.no_grad():
        last = chat.model(input_ids=torch.tensor([alone])).logits[0, -1].log_softmax(-1)
    for text, option in (("Answer:", " A"), ("Answer: ", "A")):  # a space that ends the text is the option's
        assert chat.continuations([text], [[option]])[0] == pytest.approx([float(last[after[-1]])], abs=1e-5)


def test_without_lm_eval_the_adapter_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "modalloy.evals.adapters.lm_eval", raising=False)
    with pytest.raises(ModalloyError, match=r"^lm-eval is not installed; run `pip install 'modalloy\[evals\]'`$"):
        __import__("modalloy.evals.adapters.lm_eval")


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_over_our_model_and_over_transformers(
    llama: Path, chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `mmlu` over both, and every kind of request, against transformers' own model in its own wrapper."""
    pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed (pip install lm-eval[hf])")
    from lm_eval.api.instance import Instance

    from modalloy.evals.adapters.lm_eval import lm_eval_model

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    adapter, reference = lm_eval_model(chat), transformers_model(llama)
    golden = json.loads(GOLDEN.read_text())
    for model in (adapter, reference):
        found = run_mmlu(model, tmp_path / type(model).__name__)
        assert found["acc"] == golden["acc"]
        assert {row: {**one, "likelihoods": None} for row, one in found["rows"].items()} == {
            row: {**one, "likelihoods": None} for row, one in golden["rows"].items()
        }
        for row, one in found["rows"].items():
            assert one["likelihoods"] == pytest.approx(golden["rows"][row]["likelihoods"], abs=2e-4)

    def asked(kind: str, *arguments: tuple[Any, ...]) -> list[list[Any]]:
        requests = [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]
        return [getattr(model, kind)(requests) for model in (adapter, reference)]

    pairs = [("The sky is", " blue"), ("Answer: ", "A"), ("", "no context"), ("<s>begun", " x"), ("Answer:", " B")]
    answer = reference.generate_until([Instance("generate_until", {}, ("Answer:", {"max_gen_toks": 6}), 0)])[0]
    pairs.append(("Answer:", answer))
    given, expected = asked("loglikelihood", *pairs)
    assert [score for score, _ in given] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in given] == [greedy for _, greedy in expected]
    given, expected = asked("loglikelihood_rolling", ("short",), ("long " * 500,))  # 2,500 tokens, the model's 1,024
    assert given == pytest.approx(expected, rel=1e-5)
    stop = answer[2]
    given, expected = asked(
        "generate_until",
        ("Answer:", {"max_gen_toks": 6}),
        ("Answer:", {"max_gen_toks": 6, "until": [stop]}),
        ("Answer:", {"max_gen_toks": 6, "until": stop, "temperature": 0.0, "do_sample": False}),
        ("<s>Answer:", {"max_gen_toks": 3, "until": ["</s>"]}),
    )
    assert given == expected and given[0] == answer and given[1] == answer.split(stop)[0]
    history = [{"role": "user", "content": "hello"}]
    assert (
        adapter.apply_chat_template(history) == reference.apply_chat_template(history) == "<s>user: hello\nassistant:"
    )
    assert adapter.tokenizer_name == reference.tokenizer_name

    with pytest.raises(
        ModalloyError, match="a request takes 1101 tokens, more than the model's 1024; give fewer shots"
    ):
        asked("loglikelihood", ("x" * 1099, " B"))
    with pytest.raises(
        ModalloyError, match=r"answers are decoded greedily, and the task asks for .*; set do_sample: false"
    ):
        asked("generate_until", ("x", {"do_sample": True, "temperature": 1.0}))


def transformers_model(llama: Path) -> Any:
    """lm-eval's own wrapper over transformers' own Llama."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(llama),
        tokenizer=AutoTokenizer.from_pretrained(llama),
        batch_size=1,
    )


def run_mmlu(model: Any, folder: Path) -> dict[str, Any]:
    """What lm-eval's own task files give on our rows, by the ids of our samples."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder.mkdir(parents=True)
    files = {}
    for split in ("test", "dev"):
        for subject in MMLU_TEST:
            files[subject, split] = folder / f"{subject}_{split}.jsonl"
            rows = [row for row in mmlu_hub_rows(split) if row["subject"] == subject]
            files[subject, split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    published = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    for subject in MMLU_TEST:
        task = {
            "include": str(published / f"mmlu_{subject}.yaml"),
            "task": f"local_{subject}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(files[subject, split]) for split in ("test", "dev")}},
        }
        (folder / f"{subject}.yaml").write_text(json.dumps(task))
    found = lm_eval.simple_evaluate(
        model,
        tasks=[f"local_{subject}" for subject in MMLU_TEST],
        num_fewshot=5,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    rows, right = {}, 0.0
    for subject in sorted(MMLU_TEST):
        samples = sorted(found["samples"][f"local_{subject}"], key=lambda sample: sample["doc_id"])
        right += found["results"][f"local_{subject}"]["acc,none"] * len(samples)
        for sample in samples:
            (context,) = (
                {argument["arg_0"] for argument in sample["arguments"].values()}
                if isinstance(sample["arguments"], dict)
                else {context for context, _ in sample["arguments"]}
            )
            likelihoods = [float(response[0][0]) for response in sample["resps"]]
            rows[f"{subject}/{sample['doc_id']}"] = {
                "prompt_sha256": hashlib.sha256(context.encode()).hexdigest(),
                "likelihoods": [round(nats, 5) for nats in likelihoods],
                "argmax": max(range(4), key=likelihoods.__getitem__),
            }
    return {"acc": right / len(rows), "rows": rows}


if __name__ == "__main__":
    import tempfile

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        made = run_mmlu(transformers_model(write_llama(Path(name) / "llama")), Path(name) / "tasks")
    source = "HFLM over transformers' Llama, lm-eval 0.4.13's own task files of mmlu, 5 shots"
    GOLDEN.write_text(json.dumps({"source": source, **made}, indent=1) + "\n")
