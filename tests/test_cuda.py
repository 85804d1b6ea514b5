"""What a CUDA device gives is what the CPU gives, for every method and kind of weight. Run where there is one: `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_experts import recipe, write

from modalloy import LowRank, merge, merge_deltas
from modalloy.methods import METHODS
from modalloy.verify import verify

pytestmark = pytest.mark.gpu
ROWS, COLUMNS, RANK = 96, 64, 8


def updates(n: int, device: str, *, low_rank: bool) -> list[Any]:
    draw = torch.Generator().manual_seed(3)
    pairs = [(torch.randn(ROWS, RANK, generator=draw), torch.randn(RANK, COLUMNS, generator=draw)) for _ in range(n)]
    found = [LowRank(up.to(device), down.to(device)) for up, down in pairs]
    return found if low_rank else [one.dense() for one in found]


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(method: str, low_rank: bool) -> None:
    entry = METHODS[method]
    if entry.needs_factors and not low_rank:
        pytest.skip("takes factors only")
    n, found = min(3, entry.models[1] or 3), []
    for device in ("cpu", "cuda"):
        given: dict[str, Any] = {}
        draw = torch.Generator().manual_seed(4)
        if entry.base(entry.parameters):
            given["base"] = torch.randn(ROWS, COLUMNS, generator=draw).to(device)
        if entry.takes("fishers"):
            given["fishers"] = [torch.rand(ROWS, COLUMNS, generator=draw).to(device) for _ in range(n)]
        merged = merge_deltas(updates(n, device, low_rank=low_rank), method, **given)
        dense = merged.dense() if isinstance(merged, LowRank) else merged
        assert dense.device.type == device
        found.append(dense.cpu().double())
    assert float((found[0] - found[1]).norm()) < 2e-3 * float(found[0].norm() + 1e-9)


@pytest.mark.parametrize("method", ["task_arithmetic", "ssam", "ties", "tsv", "slerp", "breadcrumbs"])
def test_mixtures_of_experts(tmp_path: Path, method: str) -> None:
    write(tmp_path, "out, in", count=2)
    file, results = recipe(tmp_path, method), []
    if METHODS[method].models[1] == 1:
        file.write_text(file.read_text().replace(', {"model": "tuned2"}', ""))
    for device in ("cpu", "cuda"):
        merge(file, tmp_path / device, device=device)
        assert "recomputed" in verify(tmp_path / device, full=True).summary()
        results.append(load_file(tmp_path / device / "model.safetensors"))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], atol=1e-4, rtol=1e-4)
