"""Names, shapes and configs of published models from `golden/families`, where `{0..31}` stands for every layer."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden" / "families"
MODELS = sorted(path.stem for path in FOLDER.glob("*.json"))
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def published(model: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Header and config of a model."""
    content = json.loads((FOLDER / f"{model}.json").read_text("utf-8"))
    header = {name: tuple(shape) for folded, shape in content["tensors"].items() for name in unfolded(folded)}
    return header, content["config"]


def unfolded(name: str) -> list[str]:
    """Every name that a folded one stands for."""
    ranges = [range(int(first), int(last) + 1) for first, last in RANGE.findall(name)]
    pattern = RANGE.sub("{}", name)
    return [pattern.format(*indices) for indices in itertools.product(*ranges)]
