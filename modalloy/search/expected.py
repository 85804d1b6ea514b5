"""What each specialist expects as answers to the probes of its own sense, and how far a candidate is from that."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np

from modalloy.evals.benchmark import Sample
from modalloy.model.chat import Tokens
from modalloy.search.asking import Asking, Line
from modalloy.search.objective import Table, divergence, log_shares

LIKELIEST = 16  # tokens of a specialist whose likelihoods are compared one by one, at every place of an answer


class Expected:
    """The distributions of the specialists, each asked once: over a probe's options; where it has none, over the next tokens
    at every place of the specialist's own answer, its LIKELIEST and all others together.

    The divergence of these is at most that of the whole vocabulary (data processing inequality).
    """

    def __init__(self, asking: Asking) -> None:
        self.asking = asking

    @cached_property
    def asked(self) -> list[Sample]:
        """The probes of one sense, as they are put to a candidate."""
        free = self.asking.ask_parents([probe for probe in self.asking.own if not probe.choices])
        return [replace(probe, options=probe.choices or (free[probe.id]["text"],)) for probe in self.asking.own]

    @cached_property
    def _lines(self) -> dict[str, Line]:
        """What the specialists gave, by the probe's id."""
        tokens = {probe.id: LIKELIEST for probe in self.asked if not probe.choices}
        return self.asking.ask_parents(self.asked, tokens)

    @cached_property
    def tokens(self) -> Mapping[str, Tokens]:
        """The tokens that candidates are asked for: those that the specialist finds likeliest, by the id of the probe."""
        free = {probe.id: self._lines[probe.id] for probe in self.asked if not probe.choices}
        return {key: np.reshape(line["predicted"], (_places(line), -1)).tolist() for key, line in free.items()}

    @cached_property
    def own(self) -> list[Table]:
        """The specialist's log-probabilities (places, n) for every probe that is asked."""
        lines = [self._lines[probe.id] for probe in self.asked]
        return [log_shares(line["likelihoods"], _places(line)) for line in lines]

    def divergences(self, lines: list[Line]) -> list[float]:
        """KL(specialist || candidate) in nats of every probe, the mean over the places of an answer."""
        pairs = zip(self.own, lines, strict=True)
        return [divergence(own, log_shares(line["likelihoods"], len(own))) for own, line in pairs]

    def disagreements(self, lines: list[Line], *, weighted: bool) -> list[float]:
        """1 where a candidate's likeliest option is not the specialist's, else 0; or `weighted` by the probability that the
        specialist gives its option, over the mean of these."""
        differs = np.array(
            [own.argmax() != np.argmax(line["likelihoods"]) for own, line in zip(self.own, lines, strict=True)]
        )
        sure = np.array([np.exp(own.max()) if weighted else 1.0 for own in self.own])
        return list(map(float, differs * sure / sure.mean()))


def _places(line: Line) -> int:
    """Of how many places of an answer a line holds likelihoods: at each of its predicted tokens, and of all others together."""
    return len(line["likelihoods"]) - len(line["predicted"]) if "predicted" in line else 1
