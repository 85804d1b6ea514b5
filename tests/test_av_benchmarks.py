"""MUSIC-AVQA, AVQA and MCUB: official and ModelCompose files, combinations of modalities, files that do not fit."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures_evals import MUSIC_CLIPS, write_avqa, write_json, write_mcub, write_media, write_music_avqa

from modalloy.errors import ModalloyError
from modalloy.evals import BENCHMARKS, find_benchmark
from modalloy.evals.benchmark import Answer, Sample, Source, Verdict, questions
from modalloy.evals.modelcompose import option_lines, without_tags
from modalloy.evals.music_avqa import ANSWERS, FILLINGS, NORMALIZED, closed_set
from modalloy.senses.media import load_audio, load_image, load_points, load_video

LOADERS: dict[str, Callable[[str], Any]] = {
    "image": load_image,
    "audio": load_audio,
    "video": lambda path: load_video(path, 8),
    "point": load_points,
}
ALL = "Video: <video>\nImage: <image>\nAudio: <audio>\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One data folder for every task and variant."""
    root = tmp_path_factory.mktemp("data")
    written = {
        f"{name} {variant}": write(root / name / variant, variant)
        for name, write in (("music_avqa", write_music_avqa), ("avqa", write_avqa))
        for variant in BENCHMARKS[name].variants
    }
    mcub = write_mcub(root / "mcub")
    return written | {"mcub3 modelcompose": mcub, "mcub4 modelcompose": mcub}


def ask(folder: Path, name: str, *modalities: str, **options: Any) -> list[Sample]:
    return questions(find_benchmark(name), Source(folder, modalities=modalities or None, **options))


@pytest.mark.parametrize(
    ("task", "n"),
    [
        ("music_avqa modelcompose", 10),
        ("music_avqa official", 10),
        ("music_avqa official-updated", 9),
        ("avqa modelcompose", 8),
        ("avqa official", 8),
        ("mcub3 modelcompose", 12),
        ("mcub4 modelcompose", 8),
    ],
)
def test_every_format_is_read(folders: dict[str, Path], task: str, n: int) -> None:
    name, variant = task.split()
    source = Source(folders[task])
    benchmark = find_benchmark(name)
    samples = benchmark.samples(source)
    assert len(samples) == n == len({sample.id for sample in samples})
    assert variant in benchmark.variants and source.read
    tags = [f"<{modality}>" for modality, _ in samples[0].media]
    assert [word for word in samples[0].text.split() if word in tags] == tags, "media are in the order of their tags"
    for modality, path in {medium for sample in samples for medium in sample.media}:
        LOADERS[modality](path)
    for sample in samples:
        assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
        for rule in benchmark.rules.values():
            assert rule(sample, Answer(sample.golds[0])).correct and not rule(sample, Answer("")).correct


def test_music_avqa_official(folders: dict[str, Path]) -> None:
    folder = folders["music_avqa official"]
    samples = {sample.id: sample for sample in ask(folder, "music_avqa")}
    assert samples["8"].text == f"{ALL}Which instrument makes sounds before the pipa?"
    assert samples["8"].golds == ("acoustic_guitar",)
    assert samples["8"].group == {"type": "Audio-Visual Temporal", "modality": "Audio-Visual", "clips": "synthetic"}
    assert samples["8"].kind == "Which instrument makes sounds <BA> the <Object>?"
    assert samples["8"].media == tuple(
        (sense, str(folder / sense / f"sa00000003.{suffix}"))
        for sense, suffix in (("video", "mp4"), ("image", "jpg"), ("audio", "wav"))
    )
    assert samples["11"].text.endswith("\nIs the erhu on the left louder than the suona on the right?")
    assert samples["11"].media[2] == ("audio", samples["11"].media[0][1]), "without a .wav, the video's own sound"
    assert (samples["7"].golds, samples["7#2"].golds) == (("one",), ("three",)), (
        "both rows of one id, each its own answer"
    )
    assert Counter(sample.group["clips"] for sample in samples.values()) == {"real": 6, "synthetic": 4}
    assert samples["3"].cluster == ("00000001",)


def test_media_roots(folders: dict[str, Path], tmp_path: Path) -> None:
    roots = {"": tmp_path / "all", "audio": tmp_path / "sounds"}
    first = ask(folders["music_avqa official"], "music_avqa", roots=roots)[0]
    assert [path for _, path in first.media] == [
        str(tmp_path / "all/video/00000001.mp4"),
        str(tmp_path / "all/image/00000001.jpg"),
        str(tmp_path / "all/video/00000001.mp4"),  # sounds/ has none
    ]
    write_media(tmp_path / "own", MUSIC_CLIPS[:2])
    roots["audio"] = tmp_path / "own/audio"
    first = ask(folders["music_avqa official"], "music_avqa", roots=roots)[0]
    assert first.media[2] == ("audio", str(tmp_path / "own/audio/00000001.wav"))


def test_music_avqa_compose(folders: dict[str, Path]) -> None:
    folder = folders["music_avqa modelcompose"]
    samples = {sample.id: sample for sample in ask(folder, "music_avqa")}
    official = {sample.id: sample for sample in ask(folders["music_avqa official"], "music_avqa")}
    assert {id: (s.text, s.golds) for id, s in samples.items()} == {id: (s.text, s.golds) for id, s in official.items()}
    assert samples["8"].group == {"clips": "synthetic"} and samples["8"].cluster == ("sa00000003",)
    assert samples["8"].media[1] == ("image", str(folder / "data/evaluation_datasets/MUSIC-AVQA/image/sa00000003.jpg"))
    kinds = {(samples[id].kind, official[id].kind) for id in samples}
    assert len(kinds) == len({kind for kind, _ in kinds}) == len({kind for _, kind in kinds}), (
        "templates are told apart"
    )
    assert FILLINGS.sub("<>", "Is the acoustic_guitar on the left?") == "Is the <> on the <>?"


def test_closed_set() -> None:
    assert len(ANSWERS) == len(set(NORMALIZED)) == 42
    sample = Sample(id="1", text="?", golds=("acoustic_guitar",))
    assert closed_set(sample, Answer("It is an acoustic guitar.")) == Verdict("acoustic_guitar", True)
    assert closed_set(sample, Answer("a violin")) == Verdict("violin", False)
    assert closed_set(sample, Answer("violin or acoustic guitar")) == Verdict(None, False)
    assert closed_set(sample, Answer("a pianola")) == Verdict(None, False)
    many = Sample(id="2", text="?", golds=("more than ten",))
    assert closed_set(many, Answer("There are more than ten!")) == Verdict("more than ten", True)
    assert closed_set(many, Answer("10")) == Verdict("ten", False)


def test_avqa_official(folders: dict[str, Path]) -> None:
    samples = ask(folders["avqa official"], "avqa")
    assert samples[0].text == f"{ALL}What makes the sound?\nA. dog\nB. cat\nC. train\nD. rain"
    assert samples[0].group == {"question_type": "Which", "relation": "Sound"}
    # an option that is null: no line, and the others keep their letters
    assert samples[1].text.endswith("Where is it?\nA. street\nC. kitchen\nD. sea")
    assert (samples[1].choices, samples[1].golds) == (("street", "", "kitchen", "sea"), ("C",))
    assert [sample.golds[0] for sample in samples] == list("ACDBBDAC"), "the answer is an index"
    robust = BENCHMARKS["avqa"].rules["robust"]
    assert robust(samples[1], Answer("in the kitchen")) == Verdict("C", True)
    assert robust(samples[1], Answer("none")) == Verdict(None, False)
    assert samples[0].cluster == ("Ab1dEfGh2Ij_000030",)


def test_mcub_subsets(folders: dict[str, Path]) -> None:
    samples = ask(folders["mcub3 modelcompose"], "mcub3")
    assert Counter(sample.group["subset"] for sample in samples) == {"I+A+V": 3, "A+V+P": 3, "I+A+P": 3, "I+V+P": 3}
    assert samples[3].id == "A+V+P/audio-video-pointcloud-0"
    assert [modality for modality, _ in samples[3].media] == ["audio", "video", "point"]
    assert samples[3].choices == ("They are animals", "They are metal", "They are vehicles", "None of it")
    whole = ask(folders["mcub4 modelcompose"], "mcub4")
    assert [modality for modality, _ in whole[0].media] == ["image", "audio", "video", "point"]
    assert whole[0].id == "0" and [sample.golds[0] for sample in whole] == list("ABCABCAB")


def test_a_combination_has_its_own_file_or_loses_tags(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["avqa modelcompose"]
    own = Source(folder, modalities=("audio", "video"))
    samples = BENCHMARKS["avqa"].samples(own)
    assert list(own.read) == ["test/avqa-test_mm_answer.json", "test/avqa-test_mm_video+audio.json"]
    assert samples[0].text.startswith("Video: <video>\nAudio: <audio>\nWhat makes")
    assert [modality for modality, _ in samples[0].media] == ["video", "audio"]

    for name in ("video+image+audio", "answer"):  # only the file with all senses is there: the same prompts
        write_json(
            tmp_path / f"avqa-test_mm_{name}.json", json.loads((folder / f"test/avqa-test_mm_{name}.json").read_text())
        )
    cut = ask(tmp_path, "avqa", "audio", "video", roots={"": folder})
    assert cut == samples
    with pytest.raises(ModalloyError, match=r"avqa: its questions never show point; it shows video\+image\+audio"):
        ask(tmp_path, "avqa", "point")
    official = ask(folders["avqa official"], "avqa", "image")[0]
    assert official.text.startswith("Image: <image>\nWhat") and [m for m, _ in official.media] == ["image"]
    three = ask(folders["mcub3 modelcompose"], "mcub3", "image", "point")
    assert three[3].text.startswith("Point: <point>\nWhat do") and [m for m, _ in three[3].media] == ["point"]
    assert three[0].text.startswith("Image: <image>\nWhat do")


def test_tags_are_cut_with_their_labels_and_lines() -> None:
    def cut(text: str) -> str:
        return without_tags(text, lambda modality: modality in ("image", "point"))

    assert cut("Video: <video>\nImage: <image>\nAudio: <audio>\nQ?") == "Video: <video>\nAudio: <audio>\nQ?"
    assert cut("<vision>\n3D shape: <point_cloud>\nQ?") == "Q?"
    assert cut("Image: <image> Audio: <audio>\nQ?") == "Audio: <audio>\nQ?"
    assert cut("Question: <image> Q?") == "Question: Q?"
    assert cut("\nA. x \n<Object>\n") == "\nA. x \n<Object>\n"
    assert without_tags("Image: <image> Audio: <audio>\nQ?") == "Q?"
    assert option_lines("Q?\nA. one \nB) two\nC: three") == ("one", "two", "three")
    assert option_lines("Q? A. one B. two") == option_lines("A. one\nC. two") == option_lines("A. one") == ()


def test_the_nth_tag_takes_the_nth_file(tmp_path: Path) -> None:
    turns = [{"value": "<image> or <audio> or <image>?\nA. x\nB. y"}, {"value": None}]
    row = {"id": 1, "conversations": turns, "modal_inputs": {"vision": ["a/1.jpg", "2.jpg"], "audio": ["/3.wav"]}}
    write_json(tmp_path / "MCUB-4.json", [row])
    write_json(tmp_path / "MCUB-answer.json", [{"id": "1", "conversations": [{"value": "A"}]}])
    (sample,) = ask(tmp_path, "mcub4")
    assert sample.media == (("image", f"{tmp_path}/a/1.jpg"), ("audio", "/3.wav"), ("image", f"{tmp_path}/2.jpg"))
    (sample,) = ask(tmp_path, "mcub4", "image")
    assert sample.text == "<image> or or <image>?\nA. x\nB. y" and [path for _, path in sample.media] == [
        f"{tmp_path}/a/1.jpg",
        f"{tmp_path}/2.jpg",
    ]


def test_repeated_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["music_avqa modelcompose"] / "test"
    stem = "music-avqa-test_mm"
    questions, answers = (
        json.loads((folder / f"{stem}_{name}.json").read_text()) for name in ("video+image+audio", "answer")
    )
    write_json(tmp_path / f"{stem}_video+image+audio.json", questions)
    write_json(tmp_path / f"{stem}_answer.json", answers[:5] + answers[6:])  # one answer to both questions
    golds = {sample.id: sample.golds[0] for sample in ask(tmp_path, "music_avqa")}
    assert golds["7"] == golds["7#2"] == "one"
    thrice = answers[5] | {"conversations": [{"from": "gpt", "value": "four"}]}
    write_json(tmp_path / f"{stem}_answer.json", [*answers, thrice])
    with pytest.raises(ModalloyError, match=r"has 3 differing answers to '7', which is asked 2 times"):
        ask(tmp_path, "music_avqa")
    write_json(tmp_path / f"{stem}_video+image+audio.json", [*questions, questions[5]])
    golds = {sample.id: sample.golds[0] for sample in ask(tmp_path, "music_avqa")}
    assert (golds["7"], golds["7#2"], golds["7#3"]) == ("one", "three", "four")


def change(rows: list[Any], index: int, **values: Any) -> list[Any]:
    return [row | values if place == index else row for place, row in enumerate(rows)]


def without(rows: list[Any], key: str) -> list[Any]:
    return [rows[0], {name: value for name, value in rows[1].items() if name != key}, *rows[2:]]


@pytest.mark.parametrize(
    ("task", "file", "damage", "message"),
    [
        ("music_avqa official", "json/avqa-test.json", lambda r: without(r, "anser"), r"row 1 lacks 'anser'"),
        (
            "music_avqa official",
            "json/avqa-test.json",
            lambda r: change(r, 1, templ_values='["tuba"]'),
            r"row 1 .*1 values",
        ),
        ("music_avqa official", "json/avqa-test.json", lambda r: change(r, 1, templ_values="[1, 2]"), r"row 1 .*form"),
        ("music_avqa official", "json/avqa-test.json", lambda r: change(r, 1, type="Audio"), r"row 1 has a field of"),
        ("music_avqa official", "json/avqa-test.json", lambda r: change(r, 1, anser=2), r"row 1 .*2 is not text"),
        ("music_avqa official", "json/avqa-test.json", lambda r: {"rows": r}, r"holds a dict, not a list"),
        ("avqa official", "val_qa.json", lambda r: change(r, 1, answer=4), r"row 1 .*answer 4 to 4 options"),
        ("avqa official", "val_qa.json", lambda r: change(r, 1, answer="C"), r"row 1 .*answer 'C' to 4 options"),
        ("avqa official", "val_qa.json", lambda r: change(r, 1, multi_choice="abcd"), r"row 1 .*'abcd' is not a list"),
        ("avqa official", "val_qa.json", lambda r: [7], r"row 0 has a field of another form"),
        ("mcub4 modelcompose", "data/test/MCUB-answer.json", lambda r: r[:-1], r"no answer to 1 questions .*first '7'"),
        ("mcub4 modelcompose", "data/test/MCUB-4.json", lambda r: change(r, 1, modal_inputs={}), r"row 1 .*do not fit"),
        ("mcub4 modelcompose", "data/test/MCUB-4.json", lambda r: change(r, 1, modal_inputs=[]), r"row 1 .*form"),
        ("mcub4 modelcompose", "data/test/MCUB-4.json", lambda r: change(r, 1, conversations=[]), r"row 1 .*form"),
        ("mcub4 modelcompose", "data/test/MCUB-4.json", lambda r: without(r, "id"), r"row 1 lacks 'id'"),
        ("mcub3 modelcompose", "data/test/MCUB-answer.json", lambda r: without(r, "conversations"), r"lacks 'conv"),
        ("avqa modelcompose", "test/avqa-test_mm_video+image+audio.json", lambda r: r[1:], r"lacks 1 .*first 'q0'"),
    ],
)
def test_files_that_do_not_fit(
    folders: dict[str, Path], tmp_path: Path, task: str, file: str, damage: Callable[[list[Any]], Any], message: str
) -> None:
    for path in folders[task].rglob("*.json"):
        write_json(tmp_path / path.relative_to(folders[task]), json.loads(path.read_text()))
    write_json(tmp_path / file, damage(json.loads((tmp_path / file).read_text())))
    with pytest.raises(ModalloyError, match=message) as caught:
        ask(tmp_path, task.split()[0])
    assert "\n" not in str(caught.value) and Path(file).name in str(caught.value)


def test_variants_are_chosen_not_guessed(folders: dict[str, Path], tmp_path: Path) -> None:
    write_music_avqa(tmp_path, "official")
    with pytest.raises(ModalloyError, match="no variant 'update'; known: modelcompose, official, official-updated"):
        ask(tmp_path, "music_avqa", variant="update")
    with pytest.raises(ModalloyError, match=r"holds no file of music_avqa \(official-updated\)"):
        ask(tmp_path, "music_avqa", variant="official-updated")
    write_music_avqa(tmp_path, "official-updated")
    with pytest.raises(ModalloyError, match=r"several variants of music_avqa; .*--variant: official, official-updated"):
        ask(tmp_path, "music_avqa")
    assert len(ask(tmp_path, "music_avqa", variant="official-updated")) == 9
    for name in ("music_avqa", "avqa", "mcub3", "mcub4"):
        with pytest.raises(ModalloyError, match=f"holds no file of {name}"):
            ask(tmp_path / "video", name)


def test_missing_files_of_a_set(folders: dict[str, Path], tmp_path: Path) -> None:
    mcub = folders["mcub3 modelcompose"] / "data/test"
    for name in ("MCUB-3-image-audio-video.json", "MCUB-answer.json"):
        write_json(tmp_path / name, json.loads((mcub / name).read_text()))
    with pytest.raises(ModalloyError, match=r"holds none of MCUB-3-audio-video-pointcloud\.json, test/"):
        ask(tmp_path, "mcub3")
    compose = folders["avqa modelcompose"] / "test"
    write_json(
        tmp_path / "avqa-test_mm_video+audio.json", json.loads((compose / "avqa-test_mm_video+audio.json").read_text())
    )
    with pytest.raises(ModalloyError, match=r"holds none of avqa-test_mm_video\+image\+audio\.json"):
        ask(tmp_path, "avqa")
    with pytest.raises(ModalloyError, match=r"holds none of avqa-test_mm_answer\.json"):
        ask(tmp_path, "avqa", "video", "audio")
