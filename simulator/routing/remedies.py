"""What balancing does to the router's tendencies, over the steps of training.

A balancing loss shrinks popularity: sigma -> sigma / (1 + sum_i A_i weight_i^p) over the losses in force. p and the
strengths A are read off published loads (validation/routing/balancing.py fits them again):

* importance and load loss: p = 0.388, A = 18.8 and 80.3, from 1701.06538, Table 6 (untreated: the sigma with its CV
  of 3.01, 1.93 in logit units);
* load-balance loss: A = 109, from MaxVio 0.72 and 0.52 at weight 1e-3 (2408.15664, Table 2); it then gives CV 0.10 at
  Switch's weight of 1e-2, which drops less than 1 % at capacity factor 1.25 as published;
* sequence-wise loss: the same on popularity, and A = 35 on the preferences of documents, from the loads by domain of
  DeepSeek-V3's Appendix C, if their loss had weight 1e-3 (not published);
* device and communication losses (2405.04434) act on the mean popularity of a device's experts, with A = 109: at even
  loads they have the same size as the load-balance loss;
* the router z-loss limits the size of logits and leaves the load as it is.

The bias of DeepSeek-V3 is simulated in closed loop, with growth and drift of popularity: :mod:`.evolution`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from simulator.routing.evolution import Batch, Treated, World
from simulator.routing.tendencies import Tendencies
from simulator.spec.model import MixtureOfExperts
from simulator.spec.routing import Growth, Remedy

EXPONENT = 0.388
STRENGTH = {"importance": 18.8, "load": 80.3, "load_balance": 109.0, "sequence": 109.0}
SEQUENCE_STRENGTH_ON_DOCUMENTS = 35.0
DEFAULT_WEIGHT = {
    "importance": 0.1,
    "load": 0.1,
    "load_balance": 0.01,
    "z": 0.001,
    "device": 0.05,
    "communication": 0.02,
    "sequence": 0.0001,
}
"""Weights of the papers: 1701.06538 (Table 6), 2101.03961, 2202.08906, 2405.04434 and 2412.19437."""
DEFAULT_GAMMA = 0.001


def shrunk(plain: Tendencies, remedies: Sequence[Remedy], devices: int) -> Tendencies:
    """Tendencies under the balancing losses; the bias is not one of them."""
    force = dict.fromkeys(("experts", "devices", "documents"), 0.0)
    for remedy in remedies:
        if remedy.kind == "bias":
            continue
        size = (DEFAULT_WEIGHT[remedy.kind] if remedy.weight is None else remedy.weight) ** EXPONENT
        force["experts"] += STRENGTH.get(remedy.kind, 0.0) * size
        force["devices"] += STRENGTH["load_balance"] * size if remedy.kind in ("device", "communication") else 0.0
        force["documents"] += SEQUENCE_STRENGTH_ON_DOCUMENTS * size if remedy.kind == "sequence" else 0.0
    logits = plain.logits
    layers, experts = logits.shape
    if force["devices"] and experts % devices == 0:
        by_device = logits.reshape(layers, devices, -1)
        mean = by_device.mean(-1, keepdims=True)
        logits = (by_device - mean + mean / (1.0 + force["devices"])).reshape(layers, experts)
    logits = logits / (1.0 + force["experts"])
    return replace(plain, logits=logits, domain=plain.domain / (1.0 + force["documents"]))


def trajectory(
    plain: Tendencies,
    steps: Sequence[int | None],
    *,
    remedies: Sequence[Remedy],
    moe: MixtureOfExperts,
    batch: Batch,
    growth: Growth | None = None,
    drift: float = 0.0,
    rng: np.random.Generator,
) -> Iterator[Treated]:
    """The tendencies at each of the training steps, in the order given; None stands for the settled state.

    The losses shrink popularity, which grows and wanders, and the bias answers it (:mod:`.evolution`).
    """
    gamma = next((DEFAULT_GAMMA if r.gamma is None else r.gamma for r in remedies if r.kind == "bias"), 0.0)
    treated = replace(shrunk(plain, remedies, moe.router.groups), softmax=moe.router.kind != "sigmoid")
    world = World(treated, batch, growth, drift, 0.0 if plain.even else gamma, rng)
    known: dict[int | None, Treated] = {None: world.settled()} if None in steps else {}
    for step in sorted({step for step in steps if step is not None}):
        known[step] = world.at(step)
    yield from (known[step] for step in steps)


__all__ = [
    "DEFAULT_GAMMA",
    "DEFAULT_WEIGHT",
    "EXPONENT",
    "STRENGTH",
    "Batch",
    "Treated",
    "shrunk",
    "trajectory",
]
