"""From a target's name to what writes it."""

from pathlib import Path
from typing import Any


def write(target: str, source: Path, out: Path, *, kind: str = "f16", gguf: Path | None = None) -> dict[str, Any]:
    """Write the merge in `source` for a target into the new folder `out`; returns what was made, and `lines` for a user."""
    if target == "llama.cpp":
        from modalloy.export.llama_cpp import export

        return export(source, out, kind=kind, gguf=gguf)
    if target == "transformers":
        from modalloy.export.transformers import export as export_transformers

        return export_transformers(source, out)
    from modalloy.export.vllm import export as export_vllm

    return export_vllm(source, out)
