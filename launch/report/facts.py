"""The head of the page: what the run is, how far it got, and its last figures."""

import math
import statistics
from pathlib import Path
from typing import Any

from coterie.launch.config import RunConfig
from coterie.launch.report.lines import Record
from coterie.launch.report.records import HELD_OUT, Records
from coterie.models.placement import parameter_counts

_SHARE, _HIDDEN = "exchange/exposed_share", "exchange/hidden"


def head(run_dir: Path, config: RunConfig, records: Records) -> dict[str, Any]:
    """Title, state, cards and facts."""
    return {
        "name": config.name,
        "folder": str(run_dir),
        "state": _state(config, records),
        "cards": _cards(config, records),
        "facts": _facts(config, records),
        "starts": [{"step": start["step"], "text": _layout(start)} for start in records.starts[1:]],
        "no_load": "A dense model: it has no experts, so there is no load to show."
        if config.model.moe is None
        else "The load of the experts was not recorded (yet): its first line in load.jsonl comes "
        f"after {config.monitor.heat_map_every} steps.",
    }


def _state(config: RunConfig, records: Records) -> dict[str, str]:
    """``kind`` (finished, failed, unfinished) and a sentence."""
    last, steps = _last_step(records), config.train.steps
    if records.failure is not None:
        return {"kind": "failed", "text": f"stopped: {records.failure['failure']}"}
    if last >= steps:
        return {"kind": "finished", "text": f"finished, {last:,} steps"}
    return {"kind": "unfinished", "text": f"unfinished, {last:,} of {steps:,} steps recorded"}


def _cards(config: RunConfig, records: Records) -> list[dict[str, str]]:
    """Last figures: label, value, note."""
    last = records.steps[-1]
    cards = [_card("training loss", last["loss"], f"step {last['step']:,}, nats per token")]
    if records.evaluations:
        held_out = records.evaluations[-1]
        key = next(name for name in HELD_OUT if name in held_out)
        parts = [
            f"{name.removeprefix(f'{key}/')} {value:.3f}"
            for name, value in held_out.items()
            if name.startswith(f"{key}/")
        ]
        note = ", ".join([f"step {held_out['step']:,}", *parts])
        cards.append(_card(f"{HELD_OUT[key]} loss", held_out[key], note))
    rates = [record["tokens_per_second"] for record in records.steps]
    cards.append(
        {
            "label": "tokens per second",
            "value": f"{statistics.median(rates):,.0f}",
            "note": "median over the run",
        }
    )
    measured = [record for record in records.steps if _HIDDEN in record]
    if measured:
        hidden, step = measured[-1][_HIDDEN], measured[-1]["step"]
        note = f"of the way of rows between ranks, step {step:,}"
        cards.append({"label": "hidden", "value": f"{hidden:.0%}", "note": note})
    seen = last["step"] * config.train.global_batch * config.data.sequence
    cards.append({"label": "tokens", "value": _large(seen), "note": "trained on, with padding"})
    return cards


def _card(label: str, value: float, note: str) -> dict[str, str]:
    return {
        "label": label,
        "value": f"{value:.4f}" if math.isfinite(value) else str(value),
        "note": note,
    }


def _facts(config: RunConfig, records: Records) -> list[list[str]]:
    """Names and values."""
    model, train = config.model, config.train
    total, active = parameter_counts(model)
    optimizer = config.optimizer
    facts = [
        ["Model", f"{model.layers} layers, width {model.width}, vocabulary {model.vocabulary:,}"],
        ["Parameters", f"{_large(total)}, {_large(active)} active for a token"],
        ["Experts", _experts(config)],
        ["Router", _router(config)],
        [
            "Batch",
            f"{train.global_batch} sequences of {config.data.sequence} tokens"
            + (f" in {train.accumulation} micro-batches" if train.accumulation > 1 else ""),
        ],
        ["Optimizer", f"learning rate {optimizer.lr:g}, warm-up {optimizer.warmup} steps"],
        ["Data", config.data.path or f"built-in corpus {config.data.corpus}"],
        ["Seed", str(train.seed)],
    ]
    shares = [record[_SHARE] for record in records.steps if _SHARE in record]
    if shares and model.moe is not None:
        median = f"{statistics.median(shares):.1%}"
        kind = model.moe.exchange.kind
        facts.append(["Exchange", f"{kind}, waiting for rows {median} of a step (median)"])
    if records.starts:
        facts.append(["Layout", _layout(records.starts[-1])])
        resumed = len(records.starts) - 1
        if resumed:
            at = ", ".join(f"{start['step']:,}" for start in records.starts[1:])
            facts.append(["Resumed", f"{resumed} time{'s' * (resumed > 1)}, after step {at}"])
    return facts


def _experts(config: RunConfig) -> str:
    model = config.model
    counts = {model.experts_of(layer) for layer in range(model.layers) if model.is_moe(layer)}
    if model.moe is None or not counts:
        return "none: a dense model"
    layers = sum(model.is_moe(layer) for layer in range(model.layers))
    number = " or ".join(str(count) for count in sorted(counts))
    shared = " and shared ones" if model.moe.shared else ""
    return f"{number} of hidden width {model.moe.experts.hidden}{shared} in {layers} layers"


def _router(config: RunConfig) -> str:
    """Its kind, and the settings that are not the defaults."""
    if config.model.moe is None:
        return "none"
    router = config.model.moe.router
    changed = router.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
    rows = f"{router.rows_per_token:g} expert{'s' * (router.rows_per_token != 1)} for a token"
    settings = ", ".join(f"{name} {value}" for name, value in changed.items() if name != "k")
    return ", ".join(part for part in (router.kind, rows, settings) if part)


def _layout(start: Record) -> str:
    if start["ranks"] == 1:
        return "one process"
    return f"{start['ranks']} processes: {start['layout']}"


def _last_step(records: Records) -> int:
    """That was taken; metrics.jsonl names only every so many."""
    loads = [record.step for record in records.loads[-1:]]
    failed = [records.failure["step"] - 1] if records.failure else []
    return max([records.steps[-1]["step"], *loads, *failed])


def _large(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
