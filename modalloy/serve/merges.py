"""How served models were merged: what their folders say, and what `inspect` measures of the inputs, when someone asks."""

import asyncio
import hashlib
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, ModalloyError, plain
from modalloy.files import read_file
from modalloy.outputs.manifest import read_manifest
from modalloy.outputs.sources import SOURCES, read_sources
from modalloy.recipe import load_recipe
from modalloy.serve.refusal import RefusalError
from modalloy.storage.folder import reading

CARD, RECIPE = "README.md", "recipe.yaml"
MAX_TEXT_BYTES = 1_000_000  # of a card or a recipe that is shown
SECONDS = 180.0  # that an inspection may take
MEMORY_BYTES = 16_000_000_000  # of addresses, of which the libraries take about a third
INSPECT = "run `modalloy inspect` on its recipe"


class Merges:
    """The merges that some models came from, by the models' names. One inspection is under way at a time, each is made once."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = folders
        self._inspected: dict[str, dict[str, Any]] = {}
        self._turn = asyncio.Lock()

    def facts(self, name: str) -> dict[str, Any]:
        """Manifest, recipe and card of a model; `merge` is None, and `reason` says why, if it is no result of a merge.

        `fates` counts the manifest's tensors by source, fate and why. `inspection` says whether one can be made.
        """
        shown = {"id": name, "object": "modalloy.merge"}
        try:
            folder = self._folder(name)
            manifest = read_manifest(folder)
            # what a tensor went into is another for each
            fates = Counter((source, fate, why.partition(" into ")[0]) for source, _, fate, why in manifest["tensors"])
            merge = {
                **{key: value for key, value in manifest.items() if key != "tensors"},
                "fates": [[*key, count] for key, count in fates.most_common()],
                "recipe": _text(folder, RECIPE, manifest),
                "card": _text(folder, CARD, manifest),
            }
        except ModalloyError as error:
            return shown | {"merge": None, "reason": self._hidden(name, error)}
        return shown | {"merge": merge, "inspection": self._inspectable(name)}

    async def inspection(self, name: str) -> dict[str, Any]:
        """What `inspect` measures of the updates that a model was merged from: see `measured`.

        Raises:
            RefusalError: the inputs are not there, or it takes too much time or memory.
        """
        async with self._turn:
            if name not in self._inspected:
                able = await asyncio.to_thread(self._inspectable, name)
                if not able["possible"]:
                    raise RefusalError(able["reason"], status=404, code="no_inspection")
                self._inspected[name] = await _inspected(self._folder(name))
            return {"id": name, "object": "modalloy.inspection"} | self._inspected[name]

    def _inspectable(self, name: str) -> dict[str, Any]:
        """Whether the inputs of a merge are at hand, and if not, why."""
        try:
            folder = self._folder(name)
            if not (folder / SOURCES).is_file():
                return {"possible": False, "reason": f"no {SOURCES}: the inputs are not on this machine; {INSPECT}"}
            gone = read_sources(folder, load_recipe(folder / RECIPE)).gone()
        except ModalloyError as error:
            return {"possible": False, "reason": self._hidden(name, error)}
        if gone is not None:
            return {"possible": False, "reason": f"its input {gone.name} is no longer there; {INSPECT}"}
        return {"possible": True, "reason": None}

    def _folder(self, name: str) -> Path:
        if name not in self.folders:
            raise CheckpointError(f"{name}: is in no folder, so nothing is known of how it was made")
        return self.folders[name]

    def _hidden(self, name: str, error: Exception) -> str:
        """An error's line without the paths of this machine."""
        return str(error).replace(str(self.folders.get(name, name)), name)


def _text(folder: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A text of the folder, and whether it is the one that the merge wrote."""
    with reading(folder / name):
        if not (folder / name).is_file():
            return {"text": None, "unchanged": False}
        data = read_file(folder / name, MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise CheckpointError(f"{folder / name}: has more than {MAX_TEXT_BYTES} bytes; merge again")
    unchanged = manifest["outputs"].get(name) == hashlib.sha256(data).hexdigest()
    return {"text": data.decode("utf-8", "replace"), "unchanged": unchanged}


async def _inspected(folder: Path) -> dict[str, Any]:
    """What a child measures, which is ended when it takes too long, or when nobody waits for it any more."""
    command = (sys.executable, "-m", "modalloy.serve.merges", str(folder))
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        out, said = await asyncio.wait_for(child.communicate(), SECONDS)
    except asyncio.TimeoutError as error:
        raise RefusalError(f"the inspection took more than {SECONDS:.0f} s; {INSPECT}", status=503) from error
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        line = said.decode("utf-8", "replace").strip().rpartition("\n")[2].replace(str(folder), folder.name)
        raise RefusalError(f"the inspection failed ({plain(line[:300])}); {INSPECT}", status=503)
    found: dict[str, Any] = json.loads(out)
    return found


def measured(folder: Path) -> dict[str, Any]:
    """An inspection of the inputs of the merge in a folder, as the page shows it.

    `tables` are those of `modalloy inspect`; `norms` is, by specialist, the Frobenius norm of its update of each layer;
    `cosines`, by pair, that of their updates of each layer, from the cosines of its weights.
    """
    from modalloy.inspection.measure import inspect
    from modalloy.inspection.text import tables
    from modalloy.verify import recipe_at

    recipe = load_recipe(folder / RECIPE)
    found = inspect(recipe_at(recipe, read_sources(folder, recipe)), jobs=1, allow_base_mismatch=True)
    layers = sorted({slot.layer for slot in found.slots if slot.layer is not None})
    norms: dict[str, list[float]] = {one.label: [0.0] * len(layers) for one in found.specialists}
    inner: dict[tuple[str, str], list[float]] = {}
    for slot in found.slots:
        if slot.layer is None:
            continue
        place = layers.index(slot.layer)
        own = {update.specialist: update.norm for update in slot.updates}
        for label, norm in own.items():
            norms[label][place] += norm**2
        for pair in slot.pairs:
            one, other = pair.specialists
            inner.setdefault(pair.specialists, [0.0] * len(layers))[place] += (
                (pair.cosine or 0.0) * own[one] * own[other]
            )
    norms = {label: [square**0.5 for square in squares] for label, squares in norms.items()}
    cosines: dict[str, list[float | None]] = {}
    for (one, other), sums in inner.items():
        sizes = [a * b for a, b in zip(norms[one], norms[other], strict=True)]
        cosines[f"{one} · {other}"] = [value / size if size else None for value, size in zip(sums, sizes, strict=True)]
    return {
        "verdict": found.verdict,
        "findings": [{"level": one.level, "message": one.message} for one in found.findings],
        "tables": [{"head": head, "rows": rows} for head, rows in tables(found)],
        "layers": layers,
        "norms": norms,
        "cosines": cosines,
    }


def main() -> None:
    """The child: prints what is measured of the folder that is named, or one line of why not."""
    os.nice(10)  # answers come first
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        print(json.dumps(measured(Path(sys.argv[1]))))
    except ModalloyError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
