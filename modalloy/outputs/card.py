"""The model card of a result: Hugging Face front matter, what was merged and how, and the exact recipe."""

import json
from pathlib import Path

import yaml

from modalloy.methods import METHODS
from modalloy.outputs import WRITERS
from modalloy.planning.plan import Plan
from modalloy.report.escape import fence, markdown_code, markdown_text
from modalloy.senses.anatomy import native_class_name
from modalloy.specialists.licences import licences
from modalloy.storage.config import read_config
from modalloy.storage.locate import is_portable


def model_card(planned: Plan) -> str:
    """README.md of the result."""
    recipe = planned.recipe
    method, writer = recipe.merge_method, WRITERS[recipe.output.form]
    modalities = [s.modality for s in planned.specialists if s.modality]
    stated = licences([("base", planned.target.folder), *((s.label, s.checkpoint.folder) for s in planned.specialists)])
    kinds = sorted({licence for _, licence in stated})
    front: dict[str, object] = {
        "library_name": writer.library,
        "base_model": [planned.target_name, *_parents(planned)] if writer.relation == "merge" else planned.target_name,
        "base_model_relation": writer.relation,
        "tags": ["modalloy", "merge", method, *modalities],
    }
    if kinds:
        front["license"] = kinds[0] if len(kinds) == 1 else "other"
    if len(kinds) > 1:
        front["license_name"] = "those-of-the-parents"
    if writer.pipeline is not None:
        front["pipeline_tag"] = writer.pipeline
    if planned.maps:
        return _card_across(planned, front)
    labels = {s.label: markdown_text(s.label) for s in planned.specialists}
    rows = [f"| {labels[s.label]} | {s.layout} | {s.modality or '–'} | {s.rank or '–'} |" for s in planned.specialists]
    table = "\n".join(["| specialist | layout | modality | LoRA rank |", "|---|---|---|---|", *rows])
    options = " ".join(f"--{modality} FILE" for modality in dict.fromkeys(modalities))
    loader = native_class_name(read_config(planned.target.folder)) or "AutoModelForCausalLM"
    use = writer.use.format(base=json.dumps(planned.target_name), options=options, loader=loader)
    shown = "; ".join(f"{markdown_text(label)}: {markdown_text(licence)}" for label, licence in stated)
    terms = f"## Licences\n\nAs the parents' cards state them: {shown}.\n\n" if stated else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {" + ".join(labels[s.label] for s in planned.counted)}, merged by {method}

{len(planned.counted)} specialists on {markdown_code(planned.target_name)}, merged by modalloy without training and without data
({METHODS[method].paper}): {markdown_text(planned.summary())}.

{table}

## Use

{use}

{terms}{_recipe(planned)}"""


def _parents(planned: Plan) -> list[str]:
    """The models that were merged, as the recipe names them, without local folders."""
    recipe = planned.recipe
    names = []
    for entry in recipe.models:
        name = entry.model.partition("#")[0]
        names.append(name if is_portable(name, recipe.folder) else Path(name).name)
    return list(dict.fromkeys(names))


def _card_across(planned: Plan, front: dict[str, object]) -> str:
    """The card of a merge across architectures, with what each donor's map covers."""
    fates = ("merged", "duplicated", "kept", "dropped")
    rows = []
    for label, found in planned.maps.items():
        counts = found.coverage()
        shown = " | ".join(f"{counts[fate]['tensors']} ({counts[fate]['parameters'] / 1e6:.1f}M)" for fate in fates)
        rows.append(f"| {markdown_text(label)} | {found.donor} | {shown} | {found.shared()} |")
    table = "\n".join([f"| donor | family | {' | '.join(fates)} | tokens |", "|---|---|---|---|---|---|---|", *rows])
    family, name = next(iter(planned.maps.values())).target, markdown_code(planned.target_name)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {markdown_text(" + ".join((planned.target_name, *planned.maps)))}, merged by {planned.recipe.merge_method}

The architecture, encoder and projector are those of {name} ({family}); modalloy moved its decoder towards the
donors', without training and without data ({METHODS[planned.recipe.merge_method].paper}): {markdown_text(planned.summary())}.

Tensors (parameters) of the target that were merged with the donor's, merged with the weight that the target had copied them
from, or kept; tensors of the donor that were left out; and of how many tokens the rows of embeddings and head were merged:

{table}

## Use

It is loaded as {name} is. If that needs code of its own (`*.py` files), copy these here: they are not part of the
merge.

{_recipe(planned)}"""


def _recipe(planned: Plan) -> str:
    text = planned.recipe.to_yaml().strip()
    return f"""## Recipe

{fence(text)}yaml
{text}
{fence(text)}

`manifest.json` holds the sha256 of every input and output and the fate of every tensor; `modalloy verify` checks them.
"""
