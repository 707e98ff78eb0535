"""What a fit sees of a recording: the best time of every case, its weight, and the shape it belongs to.

The shape is what a split into training and held-out halves keeps together. A piece that was timed because a layer or a
model has it belongs to that layer or model, so that a held-out layer has held-out pieces; forward and backward of one
shape stay together.

The weight of a piece is its share of the layer or step that it belongs to: a fit should spend its few parameters where
the time goes, not on kernels of microseconds that no sum can tell from zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from validation.predict import ROUTING, Case
from validation.records import Record
from validation.steadiness import best, steadier

SMALLEST_SHARE = 0.002
"""Least weight of a piece, so that a layer's router is not forgotten."""


@dataclass(frozen=True)
class Sample:
    """One case with its best seconds; ``shape`` is what a split keeps together, ``weight`` its share of a layer."""

    key: str
    kind: str
    case: Case
    seconds: float
    shape: str
    weight: float


def samples(records: Sequence[Record]) -> list[Sample]:
    """The cases of a recording, corrected for drift where that makes its passes agree better."""
    found = best(steadier(records))
    owners, shares = _owners(found.values())
    return [
        Sample(
            record.key,
            record.kind,
            record.case,
            record.seconds,
            owners.get(record.key) or _shape(record),
            max(SMALLEST_SHARE, min(1.0, shares.get(record.key, 1.0))),
        )
        for record in found.values()
    ]


def routing_samples(found: Sequence[Sample]) -> list[Sample]:
    """Choosing experts and planning their rows together, for every layer of which both were timed."""
    by_key = {
        sample.key: sample for sample in found if sample.case.get("op") in ROUTING and sample.case["which"] == "F"
    }
    result = {}
    for sample in found:
        if sample.kind == "layer":
            parts = [by_key[key] for key, _ in sample.case.get("pieces", ()) if key in by_key]
            if {part.case["op"] for part in parts} == set(ROUTING):
                seconds = sum(part.seconds for part in parts)
                weight = max(SMALLEST_SHARE, min(1.0, seconds / sample.seconds))
                key = f"routing/{sample.shape}"
                result[key] = Sample(key, "routing", {"tokens": sample.case["tokens"]}, seconds, sample.shape, weight)
    return list(result.values())


def _owners(records: Iterable[Record]) -> tuple[dict[str, str], dict[str, float]]:
    """Shape of the layer or model that a piece belongs to (the last that names it), and its largest share of one."""
    owners: dict[str, str] = {}
    shares: dict[str, float] = {}
    wholes = [record for record in records if record.kind in ("layer", "step")]
    seconds = {record.key: record.seconds for record in records}
    for record in sorted(wholes, key=lambda each: each.kind):  # steps last: their layers are theirs
        for key, count in record.case.get("pieces", ()):
            owners[key] = _shape(record)
            if key in seconds:
                shares[key] = max(shares.get(key, 0.0), count * seconds[key] / record.seconds)
    for record in wholes:  # the pieces of a layer that belongs to a model belong to that model too
        if record.key in owners:
            owners.update((key, owners[record.key]) for key, _ in record.case.get("pieces", ()))
    return owners, shares


def _shape(record: Record) -> str:
    """What a case has in common with the other passes of the same shape; of a step its model without the stride."""
    if record.kind == "step":
        return f"step/{record.case.get('name', record.case['model']['name'])}"
    kept = {name: value for name, value in record.case.items() if name not in ("which", "pieces", "bytes")}
    return f"{record.kind}/{json.dumps(kept, sort_keys=True)}"


def halves(found: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples: every sort of shape is divided in halves at random."""
    sorts: dict[tuple[str, ...], list[str]] = {}
    for sample in found:
        sort = (
            sample.shape.split("/", 1)[0],
            *(str(_of_shape(sample).get(name)) for name in ("form", "implementation", "ranks", "op", "value_dim")),
        )
        members = sorts.setdefault(sort, [])
        if sample.shape not in members:
            members.append(sample.shape)
    rng, training = np.random.default_rng(seed), set()
    for sort in sorted(sorts):
        members = [sorts[sort][index] for index in rng.permutation(len(sorts[sort]))]
        training.update(members[: (len(members) + int(rng.integers(2))) // 2])
    return [each for each in found if each.shape in training], [each for each in found if each.shape not in training]


def _of_shape(sample: Sample) -> Mapping[str, object]:
    """The fields of a shape, where it has some of its own."""
    kind, _, text = sample.shape.partition("/")
    return json.loads(text) if kind != "step" else {}


__all__ = ["Sample", "halves", "routing_samples", "samples"]
