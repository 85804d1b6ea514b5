"""Answers in a batch are those of each prompt alone: with media of every kind, joining late, leaving early, known in part."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import write_omni
from native_models import MAKERS, VOCABULARY
from serving import until
from test_native import blocks_of, prompt, write_base, write_recipe, write_specialist

from modalloy import builtin, merge
from modalloy.errors import LengthError
from modalloy.model import batch as batching
from modalloy.model.alone import Alone, answering
from modalloy.model.answering import Answer, Sampling, TokenLogprob
from modalloy.model.batch import Batch, Row, is_batchable
from modalloy.model.chat import ChatModel, Prompt, user_message
from modalloy.model.kept import Kept, Marked
from modalloy.model.load import load_model
from modalloy.serve.turns import Turns

N = 12
PICTURE, OTHER, SOUND = (builtin.SAMPLES / name for name in ("horse.webp", "cow.webp", "dog.flac"))


@pytest.fixture(scope="module")
def chat(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return load_model(write_omni(tmp_path_factory.mktemp("batch"), base))


def asked(question: str, **media: Path) -> list[dict[str, object]]:
    return user_message(question, media.items())


QUESTIONS = [
    asked("what is this ?", image=PICTURE),
    asked("is this a dog ? yes , no : cat do you see the same an a ?"),
    asked("hear ?", audio=SOUND),
    asked("are these the same ?", image=OTHER, audio=SOUND),
    asked("what is this ?"),
    [*asked("do you see this ?", image=OTHER, audio=SOUND), {"role": "assistant", "content": "a dog"}, *asked("yes ?")],
]


def quiet(text: str, figures: Sequence[TokenLogprob]) -> None:
    """Nobody listens."""


def start(engine: Batch, prompt: Prompt, new_tokens: int = N) -> tuple[Answer, Row]:
    answer = Answer(engine.chat, prompt, Sampling(max_new_tokens=new_tokens), quiet)
    return answer, engine.add(answer)


def alone(chat: ChatModel, prompt: Prompt, new_tokens: int = N) -> list[int]:
    ids = chat._generate([prompt], new_tokens, None)[0, len(prompt.ids) :].tolist()
    return ids[: chat.ends.kept(ids)]


def finish(engine: Batch) -> None:
    while not engine.idle:
        engine.step()


@pytest.mark.parametrize("gap", [0, 1, 5])
def test_rows_that_join_at_any_step_answer_as_alone(chat: ChatModel, gap: int) -> None:
    engine = Batch(chat, max_rows=8)
    prompts = [chat.prompt(question) for question in QUESTIONS]
    answers = []
    for index, one in enumerate(prompts):
        answers.append(start(engine, one, N - index)[0])
        for _ in range(gap):
            engine.step()
    assert gap or len(engine.waiting) == len(prompts)
    finish(engine)
    for index, (one, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.ids == alone(chat, one, N - index)
        assert answer.answer == chat.generate([one], max_new_tokens=N - index)[0][0]
    assert engine.rows == [] and engine.mask.shape == (0, 0)


def test_prompts_with_different_media_go_through_in_one_pass(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, shapes = Batch(chat), []
    forward = chat.model.forward

    def seen(**given: object) -> object:
        embeddings, owners = given.get("inputs_embeds"), given.get("owners")
        shapes.append(len(embeddings) if isinstance(embeddings, torch.Tensor) else 0)
        if isinstance(owners, torch.Tensor):
            assert set(owners.unique().tolist()) == {0, 1, 2}
        return forward(**given)

    monkeypatch.setattr(chat.model, "forward", seen)
    for question in QUESTIONS[:5]:
        start(engine, chat.prompt(question))
    engine.step()
    assert shapes == [5, 0]  # all prompts, and then one token of each


def test_long_prompts_go_through_in_parts(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PREFILL", 16)
    long = chat.prompt(asked("is this a dog ? yes , no : cat do you see the same ? " * 10, image=PICTURE))
    short = chat.prompt(QUESTIONS[4])
    engine = Batch(chat)
    first, row = start(engine, short)
    engine.step()
    second, other = start(engine, long)
    engine.step()
    assert 0 < other.done < other.length and first.new_tokens == 3  # the short one went on in between
    finish(engine)
    assert first.ids == alone(chat, short) and second.ids == alone(chat, long)
    assert row.reused == other.reused == 0


def test_a_second_turn_knows_the_first(chat: ChatModel) -> None:
    engine = Batch(chat, kept_bytes=10**7)
    first = chat.prompt(QUESTIONS[3])
    answer, row = start(engine, first)
    finish(engine)
    assert row.reused == 0
    turns = [*QUESTIONS[3], {"role": "assistant", "content": answer.answer}, *asked("are these cat ?")]
    second = chat.prompt(turns)
    answer, row = start(engine, second)
    finish(engine)
    assert len(first.ids) - 1 <= row.reused < len(second.ids)
    assert answer.ids == alone(chat, second)
    # another picture at the same place is not the same prompt
    other = chat.prompt(asked("are these the same ?", image=PICTURE, audio=SOUND))
    answer, row = start(engine, other)
    finish(engine)
    assert row.reused == other.owners.index(chat.processor.owners.index("image")) and answer.ids == alone(chat, other)


def test_a_client_that_goes_away_frees_its_row(chat: ChatModel) -> None:
    engine = Batch(chat, max_rows=2)
    pairs = [start(engine, chat.prompt(question), 100) for question in QUESTIONS[:2]]
    assert engine.room == 0
    engine.step()
    pairs[0][0].cancelled = True
    engine.step()
    assert engine.room == 1 and pairs[0][0].finished is None
    finish(engine)
    assert pairs[1][0].ids == alone(chat, chat.prompt(QUESTIONS[1]), 100)


def test_turns_go_to_those_who_came_first_and_all_compute_in_one_thread() -> None:
    turns, order, begun, hold = Turns(), [], threading.Event(), threading.Event()

    def work(index: int) -> str:
        order.append(index)
        begun.set()
        assert hold.wait(60)
        return threading.current_thread().name

    names: list[str] = []
    threads = [
        threading.Thread(target=lambda index=index: names.append(turns.take(lambda: work(index)))) for index in range(4)
    ]
    for index, thread in enumerate(threads):
        thread.start()
        assert begun.wait(60)
        until(lambda index=index: turns.waiting == index)
    assert order == [0]
    hold.set()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3] and names == ["compute"] * 4
    with pytest.raises(ZeroDivisionError):
        turns.take(lambda: 1 // 0)
    assert turns.take(lambda: 5) == 5  # goes on after a mistake


def test_others_that_compute_in_one_thread_leave_the_turns_their_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        turns = Turns()
        assert turns.take(torch.get_num_threads) == 3
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            assert turns.take(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def test_what_is_kept_stays_within_its_bytes() -> None:
    import numpy as np

    def layers(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4))]  # 32 bytes a token

    kept = Kept(320)
    kept.add(np.arange(5), layers(5))
    kept.add(np.arange(8), layers(8))  # in the place of the first, which it begins with
    assert kept.bytes == 256 and kept.longest(Marked(np.arange(8)))[0] == 7
    assert kept.longest(Marked(np.arange(8), ((5, 8),)))[0] == 5  # a medium is known as a whole or not
    kept.add(np.arange(100, 104), layers(4))
    assert kept.bytes == 128 and kept.longest(Marked(np.arange(8)))[0] == 0
    kept.add(np.arange(200, 220), layers(20))  # has no room at all
    assert kept.bytes == 128


def test_a_seed_gives_the_same_words_whatever_is_beside_it(chat: ChatModel) -> None:
    def words(beside: int) -> list[int]:
        engine = Batch(chat)
        sampling = Sampling(max_new_tokens=N, temperature=1.3, top_p=0.9, seed=7)
        answer = Answer(chat, chat.prompt(QUESTIONS[0]), sampling, quiet)
        engine.add(answer)
        for question in QUESTIONS[1 : 1 + beside]:
            start(engine, chat.prompt(question))
        finish(engine)
        return answer.ids

    assert words(0) == words(3)
    assert words(0) != alone(chat, chat.prompt(QUESTIONS[0]))


def test_pieces_are_the_answer_and_figures_are_its_tokens(chat: ChatModel) -> None:
    found = []  # what tiny random weights say to one of the questions has a word to stop at that nothing before it holds
    for one in map(chat.prompt, QUESTIONS):
        whole = chat.generate([one], max_new_tokens=N)[0][0]
        words = whole.split()
        found += [(one, whole, word) for at, word in enumerate(words) if at > 1 and word not in " ".join(words[:at])]
    one, whole, stop = found[0]
    pieces: list[tuple[str, Sequence[TokenLogprob]]] = []
    sampling = Sampling(max_new_tokens=N, stop=(stop,), top_logprobs=3)
    answer = Answer(chat, one, sampling, lambda text, figures: pieces.append((text, figures)))
    engine = Batch(chat)
    engine.add(answer)
    finish(engine)
    assert answer.finished == "stop" and answer.answer == whole.split(stop)[0].strip()
    assert "".join(text for text, _ in pieces) == answer.answer
    figures = [figure for _, own in pieces for figure in own]
    with torch.no_grad():
        logits = chat.model(**chat.inputs([one])).logits[0, -1].double()
    best = logits.log_softmax(-1).topk(3).values
    assert [nat for _, nat in figures[0].top] == pytest.approx(best.tolist(), abs=1e-5)
    assert figures[0].logprob == figures[0].top[0][1] and len(figures) == len(answer.answer.split())


def test_a_model_with_other_states_answers_one_after_another(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(answering(chat, max_rows=4, kept_bytes=0), Batch)
    monkeypatch.setattr(chat.model.generation_config, "repetition_penalty", 1.5)
    engine = answering(chat, max_rows=4, kept_bytes=0)
    assert isinstance(engine, Alone) and not is_batchable(chat)
    answers = []
    for question in QUESTIONS[:3]:
        answers.append(Answer(chat, chat.prompt(question), Sampling(max_new_tokens=N), quiet))
        engine.add(answers[-1])
    while not engine.idle:
        engine.step()
    assert [one.answer for one in answers] == [chat.reply(one, max_new_tokens=N).answer for one in QUESTIONS[:3]]
    assert all(one.finished for one in answers)


def test_a_prompt_without_room_for_its_answer_is_refused(chat: ChatModel) -> None:
    with pytest.raises(LengthError, match="more than the model's 512"):
        start(Batch(chat), chat.prompt(QUESTIONS[0]), 512)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "qwen3_vl"])
def test_native_media_in_a_batch_answer_as_alone(tmp_path: Path, name: str) -> None:
    """Positions of three kinds, additions to layers, tokens that see each other, sliding windows."""
    model, medium = MAKERS[name]()
    write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "own", model)
    merge(write_recipe(tmp_path, [{"model": "own", "modality": medium.modality}]), tmp_path / "out", jobs=1)
    chat = load_model(tmp_path / "out")

    def shown(times: int, before: int, after: int) -> Prompt:
        draw = torch.Generator().manual_seed(times + before)
        words = torch.randint(3, VOCABULARY, (before + after,), generator=draw).tolist()
        one = prompt(chat.model, medium, times)
        middle = slice(4, 4 + times * len(medium.ids))
        ids = [*words[:before], *one["input_ids"][0, middle].tolist(), *words[before:]]
        owners = [0] * before + one["owners"][0, middle].tolist() + [0] * after
        features = {medium.modality: blocks_of(chat.model, medium, times)} if times else {}
        return Prompt("", ids, owners, features)

    prompts = [shown(1, 5, 4), shown(0, 80, 0), shown(2, 3, 70), shown(1, 90, 2), shown(0, 4, 0)]
    engine = Batch(chat, kept_bytes=10**8)
    answers = []
    for one in prompts:
        answers.append(start(engine, one)[0])
        engine.step()
    finish(engine)
    assert [answer.ids for answer in answers] == [alone(chat, one) for one in prompts]
    for index in (0, 2, 3):
        one = prompts[index]
        more = [*answers[index].ids, 9, 8, 7]
        longer = Prompt("", [*one.ids, *more], [*one.owners, *[0] * len(more)], one.features)
        answer, row = start(engine, longer)
        finish(engine)
        assert row.reused >= len(one.ids) and answer.ids == alone(chat, longer)
    # cut before the medium: its positions and additions go through again
    shared = prompts[3]
    changed = Prompt("", [*shared.ids[:-1], 3 + shared.ids[-1] % 5], shared.owners, shared.features)
    answer, row = start(engine, changed)
    finish(engine)
    assert row.reused == len(shared.ids) - 1 and answer.ids == alone(chat, changed)
