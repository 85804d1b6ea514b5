"""Merging methods: one paper, one file, one line in METHODS.

A method is a function from one matrix per specialist to the merged update; its keyword parameters are its schema.
`receives` says what it is called with when the specialists are low-rank:

- "core": small matrices C_i with D_i = Q_B C_i Q_Aᵀ. For methods with f({P D_i Qᵀ}) = P f({D_i}) Qᵀ, which are then exact.
- "factored_core": the same C_i as `LowRank`, for methods that gain by it.
- "left_core": matrices L_i (p, in) with D_i = Q_B L_i. For methods with f({P D_i}) = P f({D_i}).
- "factors": the `LowRank` updates themselves, for what is linear in every update, or defined on the factors.
- "dense": the full matrices, for what works on single entries. Such a method returns a full matrix.

When they are dense, every method gets the dense matrices; so does one that works on the weights themselves, and receives
the base's (`base`).
"""

from modalloy.methods import (
    arcee_fusion,
    average,
    breadcrumbs,
    consensus,
    core_space,
    damc,
    dare,
    dc_merge,
    della,
    do_merging,
    factorwise,
    fisher,
    iso,
    karcher,
    knots,
    linear,
    metagpt,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    optmerge,
    ram,
    sce,
    slerp,
    ssam,
    swudi,
    task_arithmetic,
    ties,
    tsv,
    wudi,
)

METHODS = {
    "arcee_fusion": arcee_fusion.METHOD,
    "average": average.METHOD,
    "breadcrumbs": breadcrumbs.BREADCRUMBS,
    "breadcrumbs_ties": breadcrumbs.BREADCRUMBS_TIES,
    "consensus": consensus.METHOD,
    "core_space": core_space.METHOD,
    "damc": damc.METHOD,
    "dare_linear": dare.DARE_LINEAR,
    "dare_ties": dare.DARE_TIES,
    "dc_merge": dc_merge.METHOD,
    "della": della.DELLA,
    "della_linear": della.DELLA_LINEAR,
    "do_merging": do_merging.METHOD,
    "factorwise": factorwise.METHOD,
    "fisher": fisher.METHOD,
    "iso_c": iso.ISO_C,
    "iso_cts": iso.ISO_CTS,
    "karcher": karcher.METHOD,
    "knots": knots.METHOD,
    "linear": linear.METHOD,
    "metagpt": metagpt.METHOD,
    "model_stock": model_stock.METHOD,
    "multislerp": multislerp.METHOD,
    "nearswap": nearswap.METHOD,
    "nuslerp": nuslerp.METHOD,
    "optmerge": optmerge.METHOD,
    "slerp": slerp.METHOD,
    "ram": ram.RAM,
    "ramplus_tl": ram.RAMPLUS_TL,
    "sce": sce.METHOD,
    "ssam": ssam.METHOD,
    "swudi": swudi.METHOD,
    "task_arithmetic": task_arithmetic.METHOD,
    "ties": ties.METHOD,
    "tsv": tsv.METHOD,
    "wudi": wudi.METHOD,
}
