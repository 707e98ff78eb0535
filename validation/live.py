"""What PyTorch does on this machine right now: one real training step, and the drops of a real layer.

    python -m validation.live < step.json

times the training step that stands on stdin as the fields of a ``step`` case, as the recorded suites are timed, and
prints seconds as JSON. :func:`drops` holds the simulator's dropped assignments against those of the reference layer:
for the same logits they must be equal, expert by expert; for logits that each side draws by itself, equally
distributed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import torch

from simulator.routing import capacity, load, routers
from simulator.routing.admission import admit
from simulator.spec.model import MixtureOfExperts, Router
from validation import torch_routers
from validation.cases import Case
from validation.checks import Check, at_most
from validation.dispatch import plan
from validation.measure import timed
from validation.moe_layer import LayerShape, Logits, MoELayer
from validation.suites import ALLOCATOR, Effort
from validation.torch_pieces import reference, work

EFFORT = Effort(seconds=2.0, repeats=8, patience_s=10.0)
SETTLE = 3
"""Steps before the measurement: the first ones allocate memory and the optimizer's states."""

GROUP, SOURCE = "calibration: drops", "reference layer in PyTorch on the same logits"
BATCHES = 1000


def step(fields: Mapping[str, Any]) -> dict[str, float]:
    """Least and median seconds of a training step, and how many were made."""
    device = torch.device("cuda" if fields.get("device") == "cuda" else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    run = work(Case("step", {name: value for name, value in fields.items() if name != "device"}), device)
    for _ in range(SETTLE):
        run()
    seconds, _ = timed(run, reference(device), EFFORT, device)
    return {"seconds": min(seconds), "median_s": median(seconds), "repeats": len(seconds)}


def drops() -> list[Check]:
    """Rows: differences for the same logits, and of the distribution for logits that are drawn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_same_logits(), *_own_logits()]
    finally:
        torch.set_num_threads(threads)


def _same_logits() -> list[Check]:
    """Assignments whose fate differs over capacity factors, drop orders and top_k; skewed logits of 512 tokens."""
    differing = compared = 0
    rng = np.random.default_rng(5)
    for top_k in (1, 2, 4):
        moe = MixtureOfExperts(experts=16, top_k=top_k, expert_ffn_size=8, router=Router(weights="after_top_k"))
        for factor in (0.75, 1.0, 1.25, 2.0):
            logits = rng.standard_normal(16) + rng.gumbel(size=(512, 16))
            ours = routers.choose(moe.router, logits, top_k)
            limit = capacity.slots(factor, 512, top_k, 16)
            expected = admit(ours.experts, limit, order="arrival", total=16)
            layer = MoELayer(LayerShape(8, moe, factor, form="padded"), dtype=torch.float64)
            with torch.no_grad():
                output = layer(torch.randn(512, 8).double(), logits=Logits(torch.from_numpy(logits)))
            theirs = output.plan.accepted.numpy()
            differing += int((theirs != expected.accepted).sum())
            counted = capacity.apply(expected.assigned, limit).dropped
            differing += int(np.abs(output.dropped.numpy() - counted).sum())
            compared += theirs.size
    name = f"assignments with another fate, of {compared:,} for the same logits"
    return [at_most(GROUP, name, 0.0, differing, "", SOURCE)]


def _own_logits() -> list[Check]:
    """Distance of the mean drops over 1000 batches, in standard errors of their difference."""
    checks = []
    for experts, top_k, tokens, factor in ((8, 2, 256, 1.0), (16, 1, 256, 1.25)):
        limit = capacity.slots(factor, tokens, top_k, experts)
        logits = torch.randn(BATCHES * tokens, experts, generator=torch.Generator().manual_seed(1))
        found = plan(torch_routers.choose(Router(), logits, top_k).experts, experts, limit, groups=BATCHES)
        real = (~found.accepted).view(BATCHES, -1).sum(1).double().numpy()
        even = np.full((BATCHES, experts), top_k / experts)
        counts = load.draw(even, tokens, top_k, np.random.default_rng(1))
        simulated = capacity.apply(counts, limit).dropped.sum(-1)
        error = float(np.sqrt((real.var() + simulated.var()) / BATCHES))
        name = f"drops of own draws, top-{top_k} of {experts}, capacity factor {factor}: distance of means"
        distance = float(abs(real.mean() - simulated.mean())) / error
        checks.append(at_most(GROUP, name, 4.0, distance, "standard errors", "1000 batches in PyTorch"))
    return checks


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):  # glibc reads them at the start only
        os.execve(sys.executable, [sys.executable, "-m", "validation.live"], os.environ | ALLOCATOR)
    print(json.dumps(step(json.load(sys.stdin))))
