"""Heat maps of a run: the load of every expert over time."""

import math
from collections.abc import Callable
from typing import Any

from coterie.data import MODALITIES
from coterie.launch.report.records import LoadRecord
from coterie.parallel.load import LayerLoad


def heat_maps(records: list[LoadRecord], columns: int) -> dict[str, Any] | None:
    """What the page's heat maps show, in about ``columns`` columns; None: there is nothing.

    By layer, then modality where it matters, then expert, then column.
    """
    if not records:
        return None
    merged = thinned(records, columns)
    layers = list(merged[0].layers)

    def over_time(value: Callable[[LayerLoad], float]) -> list[list[float]]:
        return [[round(value(one.layers[layer]), 4) for one in merged] for layer in layers]

    return {
        "first": [one.first for one in merged],
        "last": [one.step for one in merged],
        "layers": layers,
        "modalities": list(MODALITIES),
        "rows": [
            [
                [[int(one.layers[layer].rows_ME[m, e]) for one in merged] for e in range(experts)]
                for m in range(len(MODALITIES))
            ]
            for layer, experts in ((n, merged[0].layers[n].dropped_E.size) for n in layers)
        ],
        "tokens": _by_modality(merged, lambda load: load.tokens_M.tolist()),
        "unrouted": _by_modality(merged, lambda load: load.unrouted_M.tolist()),
        "dropped": over_time(lambda load: load.dropped / max(1, load.dropped + load.rows)),
        "dead": over_time(lambda load: load.dead),
        "skew": over_time(lambda load: load.skew),
        "rank_skew": over_time(lambda load: load.rank_skew),
        "entropy": over_time(lambda load: _part(load.entropy, math.log(load.dropped_E.size))),
        "ranks": max(max(one.ranks) for one in merged),
    }


def thinned(records: list[LoadRecord], columns: int) -> list[LoadRecord]:
    """Neighbours added up until there are about ``columns``; never over a change of layout."""
    each = -(-len(records) // columns)
    merged: list[LoadRecord] = []
    inside = 0
    for record in records:
        joins = merged and inside < each and merged[-1].ranks == record.ranks
        inside = inside + 1 if joins else 1
        if joins:
            merged[-1] = merged[-1] + record
        else:
            merged.append(record)
    return merged


def _by_modality(
    merged: list[LoadRecord], value: Callable[[LayerLoad], list[int]]
) -> list[list[list[int]]]:
    found = []
    for layer in merged[0].layers:
        columns = [value(one.layers[layer]) for one in merged]
        found.append([list(row) for row in zip(*columns, strict=True)])
    return found


def _part(entropy: float, largest: float) -> float:
    """Of the even router's entropy; 0 where there is one expert."""
    return entropy / largest if largest and math.isfinite(entropy) else 0.0
