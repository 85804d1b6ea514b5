"""Small benchmarks in the formats of the audio-visual ones. All of it is made up here: questions, tones, pictures, points."""

import json
from pathlib import Path
from typing import Any

import numpy as np

MUSIC_CLIPS = ("00000001", "00000002", "sa00000003", "evv00000004")
EVERYDAY_CLIPS = ("Ab1dEfGh2Ij_000030", "kL-3mNoPq_4_000110", "Rs5tUvWx6Yz_000000")
SLOTS = {"video": "Video: <video>\n", "image": "Image: <image>\n", "audio": "Audio: <audio>\n"}
COMBINATIONS = ("audio", "image", "video", "image+audio", "image+video", "video+audio", "video+image+audio")

# (clip, id, type, template, values, answer); id 7 stands twice, with different answers
MUSIC = (
    ("00000001", 3, ["Audio", "Counting"], "How many musical instruments were heard throughout the video?", [], "two"),
    ("00000001", 4, ["Audio", "Comparative"], "Is the <Object> louder than the <Object>?", ["cello", "tuba"], "no"),
    ("00000002", 5, ["Visual", "Location"], "Where is the performance?", [], "indoor"),
    ("00000002", 6, ["Visual", "Counting"], "How many <Object> are in the entire video?", ["drum"], "more than ten"),
    ("00000002", 7, ["Audio-Visual", "Counting"], "How many sounding <Object> in the video?", ["flute"], "one"),
    ("00000002", 7, ["Audio-Visual", "Counting"], "How many sounding <Object> in the video?", ["flute"], "three"),
    ("sa00000003", 8, ["Audio-Visual", "Temporal"], "Which instrument makes sounds <BA> the <Object>?", ["before", "pipa"],
     "acoustic_guitar"),
    ("sa00000003", 9, ["Audio-Visual", "Location"], "Where is the <LL> instrument?", ["loudest"], "left"),
    ("evv00000004", 10, ["Audio-Visual", "Existential"], "Is there a voiceover?", [], "yes"),
    ("evv00000004", 11, ["Audio-Visual", "Comparative"], "Is the <Object> on the <LR> louder than the <Object> on the <LR>?",
     ["erhu", "left", "suona", "right"], "yes"),
)  # fmt: skip

# (clip, question, options, index of the answer, type, relation)
EVERYDAY = (
    (0, "What makes the sound?", ["dog", "cat", "train", "rain"], 0, "Which", "Sound"),
    (0, "Where is it?", ["street", None, "kitchen", "sea"], 2, "Where", "View"),
    (0, "Why does it bark?", ["hungry", "afraid", None, "playing"], 3, "Why", "Both"),
    (1, "What happens?", ["a door closes", "a bell rings", "a man sings", "a bird sings"], 1, "Happening", "Both"),
    (1, "When is it?", ["at noon", "at night", "in the morning", "at dusk"], 1, "When", "View"),
    (1, "What comes next?", ["silence", "applause", "thunder", "laughter"], 3, "Before Next", "Both"),
    (2, "What is it used for?", ["cutting", "calling", "driving", "sleeping"], 0, "Used For", "View"),
    (2, "Where does the sound come from?", ["bus", "horn", "bell", "bell"], 2, "Come From", "Sound"),
)

MCUB_SUBSETS = {
    "image-audio-video": ("image", "audio", "video"),
    "audio-video-pointcloud": ("audio", "video", "point"),
    "image-audio-pointcloud": ("image", "audio", "point"),
    "image-video-pointcloud": ("image", "video", "point"),
}
SHARED = (("animals", "A"), ("metal", "B"), ("vehicles", "C"))


def write_media(folder: Path, names: tuple[str, ...] = MUSIC_CLIPS) -> None:
    """image/NAME.jpg and .png, audio/NAME.wav, video/NAME.mp4, point/NAME.npy; the last name has no .wav, but the video's sound."""
    import av
    import soundfile
    from PIL import Image

    for kind in ("image", "audio", "video", "point"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        colour = np.array([60 * (index % 4), 120, 250 - 60 * (index % 4)], dtype=np.uint8)
        picture = np.full((32, 32, 3), colour, dtype=np.uint8)
        picture[8:24, 8:24] = 255 - colour
        for suffix in ("jpg", "png"):
            Image.fromarray(picture).save(folder / "image" / f"{name}.{suffix}")
        tone = 0.5 * np.sin(2 * np.pi * 220 * (index + 1) * np.arange(16_000) / 16_000).astype(np.float32)
        last = index == len(names) - 1
        if not last:
            soundfile.write(folder / "audio" / f"{name}.wav", tone, 16_000)
        with av.open(str(folder / "video" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"threads": "1"})
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            if last:
                speaker = container.add_stream("aac", rate=16_000, layout="mono")
                container.start_encoding()
                heard = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
                heard.sample_rate = 16_000
                for packet in [*speaker.encode(heard), *speaker.encode(None)]:
                    container.mux(packet)
            for step in range(8):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * step, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        rng = np.random.default_rng(index)
        points = np.concatenate([rng.normal(size=(64, 3)), rng.random((64, 3))], 1)
        np.save(folder / "point" / f"{name}.npy", points.astype(np.float32))


def write_json(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def compose_row(id: int | str, text: str, answer: str | None, media: dict[str, list[str]]) -> dict[str, Any]:
    """A row of ModelCompose's test files."""
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": id, "conversations": turns, "modal_inputs": media}


def write_combinations(folder: Path, stem: str, place: str, rows: list[tuple[Any, str, str, str]]) -> None:
    """ModelCompose's files for every combination of senses, of rows (id, clip, question, answer)."""
    suffixes = {"video": "mp4", "image": "jpg", "audio": "wav"}
    for combination in COMBINATIONS:
        senses = [sense for sense in SLOTS if sense in combination.split("+")]
        tags = "".join(SLOTS[sense] for sense in senses)
        questions = []
        for id, clip, question, _ in rows:
            names = {"image": "vision"}
            media = {names.get(s, s): [f"{place}/{s}/{clip}.{suffixes[s]}"] for s in senses}
            questions.append(compose_row(id, tags + question, None, media))
        write_json(folder / "test" / f"{stem}_{combination}.json", questions)
    answers = [compose_row(id, question, answer, {}) for id, _, question, answer in rows]
    write_json(folder / "test" / f"{stem}_answer.json", answers)


def write_music_avqa(folder: Path, variant: str = "modelcompose") -> Path:
    """MUSIC-AVQA with ten questions about four clips; "official-updated" has the first of the two rows of id 7 only."""
    if variant == "modelcompose":
        rows = []
        for clip, id, _, template, values, answer in MUSIC:
            question = template
            for value in values:
                question = question[: question.index("<")] + value + question[question.index(">") + 1 :]
            rows.append((id, clip, question, answer))
        place = "data/evaluation_datasets/MUSIC-AVQA"
        write_combinations(folder, "music-avqa-test_mm", place, rows)
        write_media(folder / place, (*MUSIC_CLIPS, "other"))
        return folder
    official = [
        {
            "video_id": clip,
            "question_id": id,
            "type": json.dumps(kind),
            "question_content": template,
            "templ_values": json.dumps(values),
            "question_deleted": 0,
            "anser": answer,
        }
        for clip, id, kind, template, values, answer in MUSIC
    ]
    updated = [row for index, row in enumerate(official) if index != 5]
    if variant == "official":
        write_json(folder / "json/avqa-test.json", official)
    else:
        write_json(folder / "json_update/avqa-test.json", updated)
    write_media(folder, MUSIC_CLIPS)
    return folder


def write_avqa(folder: Path, variant: str = "modelcompose") -> Path:
    """AVQA with eight questions about three clips; two have an option that is null."""
    if variant == "modelcompose":
        rows = []
        for id, (clip, question, options, answer, _, _) in enumerate(EVERYDAY):
            lines = [f"{letter}. {option or 'none'}" for letter, option in zip("ABCD", options, strict=True)]
            rows.append((f"q{id}", EVERYDAY_CLIPS[clip], "\n".join([question, *lines]), "ABCD"[answer]))
        place = "data/evaluation_datasets/AVQA"
        write_combinations(folder, "avqa-test_mm", place, rows)
        write_media(folder / place, (*EVERYDAY_CLIPS, "other"))
        return folder
    official = [
        {
            "id": id,
            "video_name": EVERYDAY_CLIPS[clip],
            "video_id": clip,
            "question_text": question,
            "multi_choice": options,
            "answer": answer,
            "question_relation": relation,
            "question_type": kind,
        }
        for id, (clip, question, options, answer, kind, relation) in enumerate(EVERYDAY)
    ]
    write_json(folder / "val_qa.json", official)
    write_media(folder, EVERYDAY_CLIPS)
    return folder


def write_mcub(folder: Path) -> Path:
    """MCUB-3 with three questions in each of four subsets, and MCUB-4 with eight; their answers are in one file."""
    answers = []
    for subset, modalities in MCUB_SUBSETS.items():
        rows = []
        for index, (shared, answer) in enumerate(SHARED):
            id = f"{subset}-{index}"
            rows.append(_mcub_row(id, index, modalities))
            answers.append(compose_row(id, shared, answer, {}))
        write_json(folder / f"data/test/MCUB-3-{subset}.json", rows)
    rows = []
    for id in range(8):
        shared, answer = SHARED[id % 3]
        rows.append(_mcub_row(id, id, ("image", "audio", "video", "point")))
        answers.append(compose_row(id, shared, answer, {}))
    write_json(folder / "data/test/MCUB-4.json", rows)
    write_json(folder / "data/test/MCUB-answer.json", answers)
    write_media(folder / "data", ("thing0", "thing1", "thing2", "other"))
    return folder


def _mcub_row(id: int | str, index: int, modalities: tuple[str, ...]) -> dict[str, Any]:
    suffixes = {"image": "png", "audio": "wav", "video": "mp4", "point": "npy"}
    tags = "".join(f"{modality.capitalize()}: <{modality}>\n" for modality in modalities)
    question = (
        "What do they have in common?\nA. They are animals\nB. They are metal\nC. They are vehicles\nD. None of it"
    )
    names = {"image": "vision"}
    media = {names.get(m, m): [f"data/{m}/thing{index % 3}.{suffixes[m]}"] for m in modalities}
    return compose_row(id, tags + question, None, media)
