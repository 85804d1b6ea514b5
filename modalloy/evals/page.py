"""A run's scores as Markdown, CSV and one HTML page to look at examples with their media; a comparison as Markdown.

The page holds all that it shows, and a content security policy that forbids it to load or send anything. Its bytes depend
on the run, on the media's files and on where these are only."""

import html
import json
import math
import os
from collections.abc import Hashable, Sequence
from typing import Any

from modalloy.evals.benchmark import LETTERS, Sample, Verdict
from modalloy.evals.compare import Comparison, compare
from modalloy.evals.log import Entry, Run
from modalloy.evals.markdown import baselines_of, counts, group_tables, modalities_text, percent, score_table
from modalloy.evals.scores import golds_are_options, result
from modalloy.evals.shelf import Shelf
from modalloy.report.html import asset, shell

TURN = "drag to turn; double-click to change which axis points up"
OUTCOMES = {
    "right": "right",
    "wrong": "wrong",
    "unparsed": "unparsed",
    "media_error": "media error",
    "too_long": "too long",
    "oom": "no memory",
    "missing": "no answer",
}


def page(run: Run, *, examples: int = 200, other: Run | None = None) -> str:
    """The whole HTML page of a run: scores, and at most `examples` questions with media, prediction and gold.

    With an `other` run of the same questions (B; this is A) also their comparison, and both answers side by side.

    Where there are more questions, every outcome gets an equal share of the examples, rare outcomes as many as there are;
    within an outcome they are evenly spaced over the questions, sorted by group. Media that are what they should be, and
    lie where the run says, are embedded (`Shelf`); others are named, with the reason.
    """
    against = "" if other is None else _against(compare(run, other))
    scores = result(run)
    verdicts = {rule: run.verdicts(rule) for rule in run.benchmark.rules}
    rule, headline = next(iter(verdicts.items()))
    outcomes = [_outcome(entry, verdict) for entry, verdict in zip(run.entries, headline, strict=True)]
    beside: list[tuple[Entry, Verdict] | None] = [None] * len(outcomes)
    if other is not None:
        pairs = zip(other.entries, other.verdicts(rule), strict=True)
        of_other = {(entry.index, entry.sample.id): (entry, verdict) for entry, verdict in pairs}
        beside = [of_other.get((entry.index, entry.sample.id)) for entry in run.entries]
    strata = [(outcome, one is not None and one[1].correct) for outcome, one in zip(outcomes, beside, strict=True)]
    chosen = _chosen(run.entries, strata, examples)
    shelf = Shelf(run.folders)
    cards = [
        _card(run.entries[i], {name: given[i] for name, given in verdicts.items()}, outcomes[i], beside[i], shelf)
        for i in chosen
    ]
    title = " · ".join(filter(None, (run.meta["task"], run.meta["variant"], modalities_text(run.meta["modalities"]))))
    body = f"""<h1>{html.escape(title)}</h1>
<p class="quiet">{html.escape(run.benchmark.summary)}</p>
{_facts(scores)}
<h2>Scores</h2>
{_strips(scores)}
<div class="wide">{_table(*score_table(scores))}</div>
<p>{html.escape(counts(scores))}</p>
{"".join(_group(key, *table, scores) for key, table in group_tables(scores).items())}
{against}
<h2>Examples</h2>
<p class="quiet">{_choice(outcomes, chosen, shelf, other is not None)}</p>
{_filters([run.entries[i] for i in chosen], [outcomes[i] for i in chosen], len(verdicts) > 1, other is not None)}
<noscript><p>Media and filters need JavaScript.</p></noscript>
<div id="cards">{"".join(cards)}</div>"""
    return shell(
        f"modalloy eval · {title}",
        body,
        style="evals",
        scripts=[asset("evals.js")],
        data={"media": shelf.items},
        shows=["image", "media"],
    )


def _outcome(entry: Entry, verdict: Verdict) -> str:
    if entry.status != "ok":
        return entry.status
    return "unparsed" if verdict.prediction is None else "right" if verdict.correct else "wrong"


def _chosen(entries: Sequence[Entry], kinds: Sequence[Hashable], limit: int) -> list[int]:
    """Indices of at most `limit` entries, in the benchmark's order."""
    strata: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        strata.setdefault(kind, []).append(index)
    chosen, left = [], limit
    for position, stratum in enumerate(sorted(strata.values(), key=lambda one: (len(one), one[0]))):
        number = min(len(stratum), left // (len(strata) - position))  # rarest first: what they leave, others get
        left -= number
        stratum = sorted(stratum, key=lambda index: (sorted(entries[index].sample.group.items()), index))
        chosen += [stratum[(2 * i + 1) * len(stratum) // (2 * number)] for i in range(number)]
    return sorted(chosen)


def _choice(outcomes: Sequence[str], chosen: Sequence[int], shelf: Shelf, compared: bool) -> str:
    """How the examples were chosen, and what of their media is on the page."""
    if len(chosen) == len(outcomes):
        text = f"All {len(outcomes):,} questions."
    else:
        counts = ", ".join(
            f"{sum(outcomes[i] == name for i in chosen):,} of {outcomes.count(name):,} {OUTCOMES[name]}"
            for name in OUTCOMES
            if name in outcomes
        )
        text = (
            f"{len(chosen):,} of {len(outcomes):,} questions: {counts}. Every outcome"
            f"{', split by whether B is right,' if compared else ''} gets an equal share, rare ones as many as there are, so "
            "shares here say nothing about accuracy; within an outcome they are evenly spaced over the questions, sorted by group."
        )
    if shelf.missing:
        number = len(shelf.missing) + len(shelf.items)
        text += f" {len(shelf.missing):,} of {number:,} media are not on this page, each with the reason."
    return html.escape(text)


def _facts(scores: dict[str, Any]) -> str:
    facts = {"model": scores["model"], "data": scores["data"], "generation": scores["generation"]}
    facts |= {"environment": scores["environment"], "time": scores["time"]}
    items = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{'<br>'.join(map(html.escape, _flat(value))) or '–'}</dd>"
        for name, value in facts.items()
    )
    return f'<details class="facts"><summary>{html.escape(_model_name(scores["model"]))}</summary><dl>{items}</dl></details>'


def _model_name(model: Any) -> str:
    """What a reader knows the model by: the first text there is."""
    return next(iter(_flat(model)), "model").rpartition(": ")[2]


def _flat(value: Any, name: str = "") -> list[str]:
    """A nested value as lines "name: value"."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in _flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list | tuple) and any(isinstance(inner, dict | list) for inner in value):
        return [line for inner in value for line in _flat(inner, name)]
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else "–" if value is None else str(value)
    return [f"{name}: {text}" if name else text]


def _strips(scores: dict[str, Any]) -> str:
    """Accuracy of every rule with its interval, and below what blind answers get."""
    rows = ""
    for rule, one in scores["protocol"].items():
        interval = one["ci95_clustered"] or one["ci95"]
        rows += f"<b>{html.escape(rule)}</b>{_bar(one['acc'], interval)}<b>{percent(one['acc'])}</b>"
    for name, acc in baselines_of(scores):
        rows += f"<span>{html.escape(name)}</span>{_bar(acc, kind='blind')}<span>{percent(acc)}</span>"
    return f'<div class="strips">{rows}</div>'


def _bar(share: float, interval: Sequence[float] | None = None, kind: str = "") -> str:
    whisker = ""
    if interval is not None:
        low, high = interval
        whisker = f'<i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
    return f'<span class="bar {kind}"><u style="width:{100 * share:.2f}%"></u>{whisker}</span>'


def _table(head: list[str], rows: list[list[str]], bars: Sequence[str] = ()) -> str:
    """A table; `bars` are put into the first cell of their rows."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = ""
    for index, row in enumerate(rows):
        first, *others = (html.escape(cell) for cell in row)
        if bars:
            first = f'<div class="barred"><span>{first}</span>{bars[index]}</div>'
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in (first, *others)) + "</tr>"
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _group(key: str, head: list[str], rows: list[list[str]], scores: dict[str, Any]) -> str:
    bars = [_bar(cell["acc"], cell["ci95_clustered"] or cell["ci95"]) for cell in scores["groups"][key].values()]
    opened = " open" if len(rows) <= 12 else ""
    return (
        f"<details{opened}><summary>By {html.escape(key)} ({len(rows)})</summary>"
        f'<div class="wide">{_table(head, rows, bars)}</div></details>'
    )


def _filters(entries: Sequence[Entry], outcomes: Sequence[str], several_rules: bool, compared: bool) -> str:
    """The row of selectors above the examples."""
    there = {name: text for name, text in OUTCOMES.items() if name in outcomes}
    if several_rules:
        there["disagree"] = "rules disagree"
    if compared:
        there |= {"only_a": "only A right", "only_b": "only B right"}
    selects = _select("outcome", "", there)
    values: dict[str, dict[str, str]] = {}
    for entry in entries:
        for key, value in entry.sample.group.items():
            values.setdefault(key, {})[value] = value
    selects += "".join(_select(key, key, dict(sorted(found.items()))) for key, found in values.items())
    search = '<label>search <input id="search" type="search" placeholder="question, answer, file"></label>'
    return f'<div id="filters">{selects}{search}<output id="count"></output></div>'


def _against(found: Comparison) -> str:
    """Both runs by name, and the verdict by each rule."""
    lines = "".join(f"<li>{html.escape(f'{rule}: {one.verdict}')}</li>" for rule, one in found.rules.items())
    names = html.escape(f"A: {found.a} · B: {found.b} · {found.n:,} questions that both were asked")
    return f'<h2>A against B</h2><p class="quiet">{names}</p><ul>{lines}</ul>'


def _select(label: str, key: str, values: dict[str, str]) -> str:
    options = "".join(f'<option value="{html.escape(v)}">{html.escape(text)}</option>' for v, text in values.items())
    select = f'<select data-key="{html.escape(key)}"><option value="">all</option>{options}</select>'
    return f"<label>{html.escape(label)} {select}</label>"


def _card(
    entry: Entry, verdicts: dict[str, Verdict], outcome: str, beside: tuple[Entry, Verdict] | None, shelf: Shelf
) -> str:
    """One example: media, question, options, prediction, gold, raw text; and what the other run says."""
    sample, verdict = entry.sample, next(iter(verdicts.values()))
    kinds = [outcome, *(["disagree"] if len({one.correct for one in verdicts.values()}) > 1 else [])]
    shown = "".join(_medium(modality, path, shelf) for modality, path in sample.media)
    rules = ""
    if len(verdicts) > 1:
        rules = "".join(
            f'<span class="rule {"yes" if one.correct else "no"}">{html.escape(name)} {"✓" if one.correct else "✗"}</span>'
            for name, one in verdicts.items()
        )
    tags = "".join(f"<span>{html.escape(key)}: {html.escape(value)}</span>" for key, value in sample.group.items())
    facts = [("prediction", verdict.prediction or "none"), ("gold", " or ".join(sample.golds))]
    facts += [("answer", entry.answer.text)] if entry.answer.text else []
    facts += [("error", entry.error)] if entry.error else []
    if beside is not None:
        other, judged = beside
        kinds += ["only_a" if verdict.correct else "only_b"] if verdict.correct != judged.correct else []
        facts += [("prediction of B", f"{judged.prediction or 'none'} {'✓' if judged.correct else '✗'}")]
        facts += [("answer of B", other.answer.text)] if other.answer.text else []
        facts += [("error of B", other.error)] if other.error else []
    rows = "".join(
        f'<dt>{name}</dt><dd class="{name.split()[0]}">{html.escape(str(value))}</dd>' for name, value in facts
    )
    place = f"#{entry.index} · {html.escape(sample.id)} · {entry.seconds:.2f} s"
    return f"""
<article class="{outcome}" data-kinds="{" ".join(kinds)}" data-group="{html.escape(json.dumps(sample.group))}">
<header><b>{OUTCOMES[outcome]}</b>{rules}<span class="tags">{tags}</span><span class="id">{place}</span></header>
<div class="body"><div class="media">{shown}</div>
<div class="text"><p class="question">{html.escape(sample.text)}</p>{_options(entry, verdict)}<dl>{rows}</dl></div></div>
</article>"""


def _medium(modality: str, path: str, shelf: Shelf) -> str:
    place = shelf.place(modality, path)
    name = html.escape(os.path.basename(path))
    if place is None:
        caption = f"{html.escape(modality)}: {html.escape(path)}<br>{html.escape(shelf.missing[modality, path])}"
        return f'<figure class="gone"><figcaption>{caption}</figcaption></figure>'
    kind = shelf.items[place]["type"].partition("/")[0]
    tag = {
        "image": f'<img data-place="{place}" alt="{name}">',
        "audio": f'<audio data-place="{place}" controls></audio>',
        "video": f'<video data-place="{place}" controls muted loop></video>',
        "points": f'<canvas data-place="{place}" width="440" height="440" title="{TURN}"></canvas>',
    }[kind]
    caption = f'<figcaption title="{html.escape(path)}">{html.escape(modality)} · {name}</figcaption>'
    return f'<figure class="{kind}">{tag}{caption}</figure>'


def _options(entry: Entry, verdict: Verdict) -> str:
    """The options, each with its share of the likelihood where there is one."""
    sample, nats = entry.sample, entry.answer.likelihoods
    names = sample.choices or sample.options
    if not names:
        return ""
    shares: list[float] = []
    if nats:
        exps = [math.exp(value - max(nats)) for value in nats]
        shares = [value / sum(exps) for value in exps]
    rows = ""
    for index, name in enumerate(names):
        gold = _stands_for(index, sample, sample.golds)
        said = verdict.prediction is not None and _stands_for(index, sample, (verdict.prediction,))
        marks = ("✓" if gold else "") + ("◂" if said else "")
        bar = ""
        if shares:
            bar = f"{_bar(shares[index])}<span>{percent(shares[index])}</span><small>{nats[index]:.2f}</small>"
        kind = " ".join(word for word, true in (("is-gold", gold), ("is-said", said)) if true)
        rows += f'<li class="{kind}"><span>{LETTERS[index : index + 1]}</span><span>{html.escape(name)} {marks}</span>{bar}</li>'
    note = "<small>share among the options · nats</small>" if shares else ""
    return f'<ol class="options{" scored" if shares else ""}">{rows}</ol>{note}'


def _stands_for(index: int, sample: Sample, answers: Sequence[str]) -> bool:
    """Whether one of the answers is this option, by its text or, where golds are letters, by its letter."""
    if sample.choices and not golds_are_options(sample) and LETTERS[index : index + 1] in answers:
        return True
    return any(names[index].strip() in answers for names in (sample.choices, sample.options) if names)
