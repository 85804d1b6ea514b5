"""What an audit found, as data: findings in words, coefficients, and what every weight is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from modalloy.auditing.judge import Judged

Level = Literal["fault", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know: a fault of the merged model, or a note. `code` names its kind, `tensors` where it is."""

    level: Level
    code: str
    message: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coefficient:
    """What multiplies one source's update in most weights; `low` and `high` over all weights that are sums."""

    source: str
    value: float
    low: float
    high: float
    weights: int


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    `tensors` counts the base's weights (experts of one tensor singly) that the merged folder has, `checked` those whose data
    were read. `kinds` counts these by what they are: the base's, a source's, a sum or mean of the updates, a TIES of them,
    what the recipe's method gives, what cannot be told, unexplained.
    """

    merged: str
    base: str
    sources: tuple[str, ...]
    claim: str
    tensors: int
    checked: int
    full: bool
    kinds: dict[str, int]
    coefficients: tuple[Coefficient, ...]
    findings: tuple[Finding, ...]
    weights: tuple[Judged, ...] = field(repr=False, default=())

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. What cannot be told is not wrong: see `untold`."""
        return not any(finding.level == "fault" for finding in self.findings)

    @property
    def untold(self) -> int:
        """Weights that could be neither confirmed nor refuted; a finding says why."""
        return len({name for finding in self.findings if finding.code == "cannot_tell" for name in finding.tensors})

    @property
    def verdict(self) -> str:
        """One line."""
        faults = sum(finding.level == "fault" for finding in self.findings)
        seen = f"{self.checked} of {self.tensors} weights read"
        rest = "" if self.checked == self.tensors else "; --full reads all"
        if faults:
            return f"{faults} {'faults' if faults > 1 else 'fault'} found ({seen}{rest})"
        if self.untold:
            return f"nothing wrong was found, but {self.untold} weights cannot be told ({seen}{rest})"
        return f"ok: every weight is {self.claim} within rounding ({seen}{rest})"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"ok": self.ok, "untold": self.untold, "verdict": self.verdict}
