"""Small data in the official formats of MMLU, OCRBench and MMAU. All of it is made up here; none is copied."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

# subject → (question, options, letter); the first of the development questions are the examples
MMLU_DEV = [
    (f"What is {n} plus {n}?", (str(2 * n), str(2 * n + 1), str(n), "none of these"), letter)
    for n, letter in zip(range(1, 7), "AAAAAA", strict=True)
]
MMLU_TEST = {
    "elementary_mathematics": [
        ("  What is 7 times 6? ", ("36", "42", "48", "54"), "B"),
        ("Which is prime?", ("9", "15", "21", "23"), "D"),
        ("Half of 18 is", ("9", "8", "6", "2"), "A"),
        ('Tom says, "3, 2, 1".\nWhich number comes next?', ("4", "3", "0", "2"), "C"),
    ],
    "anatomy": [
        ("Which bone is in the arm?", ("femur", "skull", "humerus", "tibia"), "C"),
        ("Blood is pumped by the", ("heart", "liver", "lung", "skin"), "A"),
        ("A tooth is covered by", ("skin", "enamel", "hair", "fat"), "B"),
    ],
    "world_religions": [
        ("A pagoda is a", ("tower", "boat", "drum", "robe"), "A"),
        ("Lent ends at", ("Easter", "Diwali", "Eid", "Vesak"), "A"),
    ],
}


def write_mmlu(folder: Path) -> Path:
    """test/<subject>_test.csv and dev/<subject>_dev.csv, as in the official data.tar."""
    for subject, rows in MMLU_TEST.items():
        for split, listed in (("test", rows), ("dev", mmlu_dev(subject))):
            (folder / split).mkdir(parents=True, exist_ok=True)
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows((question, *choices, letter) for question, choices, letter in listed)
    return folder


def mmlu_dev(subject: str) -> list[tuple[str, tuple[str, ...], str]]:
    """Six development questions; the first of each subject says which it is of."""
    question, choices, letter = MMLU_DEV[0]
    return [(f"({subject}) {question}", choices, letter), *MMLU_DEV[1:]]


def mmlu_hub_rows(split: str) -> list[dict[str, Any]]:
    """The rows of the hub's table of a split."""
    listed = MMLU_TEST if split == "test" else {subject: mmlu_dev(subject) for subject in MMLU_TEST}
    return [
        {"question": question, "subject": subject, "choices": list(choices), "answer": "ABCD".index(letter)}
        for subject, rows in listed.items()
        for question, choices, letter in rows
    ]


# (data set, type, question, answers)
OCRBENCH: list[tuple[str, str, str, str | list[str]]] = [
    ("IIIT5K", "Regular Text Recognition", "what is written in the image?", "EXIT"),
    ("svtp", "Irregular Text Recognition", "what is written in the image?", ["Lou's", "LOUS"]),
    ("WordArt", "Artistic Text Recognition", "what is written in the image?", "Merry Xmas"),
    ("IAM", "Handwriting Recognition", "what is written in the image?", "sincerely"),
    ("ORAND", "Digit String Recognition", "what is the number in the image?", "0042"),
    ("NonSemanticText", "Non-Semantic Text Recognition", "what is written in the image?", "qzrt"),
    ("STVQA", "Scene Text-centric VQA", "What does the sign say?", ["no parking\n", "parking"]),
    ("docVQA", "Doc-oriented VQA", "Who signed it? ", "J. Doe"),
    ("SROIE", "Key Information Extraction", "what is the total?", "9.50"),
    (
        "HME100k",
        "Handwritten Mathematical Expression Recognition",
        "Write it as LaTeX.",
        ["x ^ 2 + Y\n", "x^{2} + Y\n"],
    ),
]


def write_ocrbench(folder: Path) -> Path:
    """OCRBench.json of the repository beside its folder of pictures."""
    (folder / "OCRBench_Images").mkdir(parents=True)
    rows = []
    for index, (dataset, kind, question, answers) in enumerate(OCRBENCH):
        path = f"{dataset}/img_{index}.png"
        target = folder / "OCRBench_Images" / path
        target.parent.mkdir()
        target.write_bytes(png(index))
        rows.append(
            {
                "dataset_name": dataset,
                "id": index,
                "image_path": path,
                "question": question,
                "answers": answers,
                "type": kind,
            }
        )
    (folder / "OCRBench.json").write_text(json.dumps(rows, indent=4))
    return folder


def ocrbench_hub_rows() -> list[dict[str, Any]]:
    """The rows of the hub's table, pictures inside; the last two share one."""
    return [
        {
            "dataset": dataset,
            "question": question,
            "question_type": kind,
            "answer": [answers] if isinstance(answers, str) else answers,
            "image": {"bytes": png(min(index, len(OCRBENCH) - 2)), "path": None},
        }
        for index, (dataset, kind, question, answers) in enumerate(OCRBENCH)
    ]


def png(seed: int) -> bytes:
    """A 32×32 picture."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


# (task, question, choices, answer)
MMAU: list[tuple[str, str, list[str], str]] = [
    ("sound", "What makes the sound?", ["dog bark", "cat", "cow", "duck"], "dog bark"),
    ("sound", "Is it indoors?", ["yes", "no"], "no"),
    ("sound", "Where is it?", ["A busy street", "A quiet park", "A train", "A boat"], "A quiet park"),
    ("music", "Which key is it in?", ["C major", "A minor", "G major", "D minor"], "A minor"),
    ("music", "Which chord is heard?", ["B:maj7/1", "E:min/1", "A:7/1", "C:maj/1"], "A:7/1"),
    ("music", "Which plays first?", ["flute", "drum", "harp", "bass", "choir"], "choir"),
    ("music", "Which comes last?", ["a", "b", "c", "d", "e", "f", "final gong", "h"], "final gong"),
    ("speech", "How many words are stressed? ", ["four", "nine", "fourteen", "fourteen"], "fourteen"),
    ("speech", "How many speak?", ["two", "two", "three", "six"], "two"),
    ("speech", "Who speaks?", ["man", "old man", "child", "robot"], "man"),
]


def write_mmau(folder: Path) -> Path:
    """mmau-test-mini.json beside test-mini-audios, which holds one-second tones."""
    import soundfile

    (folder / "test-mini-audios").mkdir(parents=True)
    rows = []
    for index, (task, question, choices, answer) in enumerate(MMAU):
        name = f"{index:08x}-0000-4000-8000-000000000000"
        tone = 0.3 * np.sin(2 * np.pi * (220 + 40 * index) * np.arange(16_000) / 16_000)
        soundfile.write(folder / "test-mini-audios" / f"{name}.wav", tone, 16_000)
        rows.append(
            {
                "id": name,
                "audio_id": f"./test-mini-audios/{name}.wav",
                "question": question,
                "choices": choices,
                "answer": answer,
                "dataset": "made up",
                "task": task,
                "split": "test-mini",
                "category": "Reasoning",
                "sub-category": "Counting" if task == "speech" else "Instrumentation",
                "difficulty": ("easy", "medium", "hard")[index % 3],
            }
        )
    (folder / "mmau-test-mini.json").write_text(json.dumps(rows, indent=4))
    return folder


def write_llama(folder: Path) -> Path:
    """A random Llama of characters, whose tokenizer puts a space before every text, as Llama's own does."""
    import string

    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [f"▁{letter}" for letter in "ABCD"]
    pieces = ["<unk>", "<s>", "</s>", "▁", *string.printable.replace(" ", ""), *letters]
    merges = [tuple(letter) for letter in letters]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
