"""Real expert loads: 26 layers x 64 experts x three domains x two balancing methods (DeepSeek-V3, Appendix C).

The file scenarios/loads/expert-load-pile-16b.csv is our reading of the published heat maps. The statistical model is
held against it, the hot-expert option is fitted on odd layers and judged on even ones, and the record is replayed
through capacity, placement and a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations, product

import numpy as np
from scipy.optimize import brentq

from simulator import load_scenario
from simulator.campaign import simulate_step
from simulator.routing import closed_forms
from simulator.routing.balance import cv, violation
from simulator.routing.chances import chances_of
from simulator.routing.load import FloatArray
from simulator.routing.placement import CLOSE_ENOUGH, balanced, contiguous, slowest_over_mean
from simulator.routing.remedies import shrunk
from simulator.routing.replay import recorded
from simulator.routing.tendencies import Tendencies, draw_tendencies
from simulator.spec.routing import HotExperts, LogitLoad, Remedy, ReplayLoad
from validation.checks import Check, at_most, near, within

FILE = "loads/expert-load-pile-16b.csv"
SOURCE = "DeepSeek-V3, arXiv 2412.19437, figure 9 and appendix C (decoded heat maps)"
MODELS, DOMAINS = ("aux_loss", "aux_loss_free"), ("wikipedia", "github", "dm_mathematics")
EXPERTS, TOP_K, LAYERS = 64, 6, 26
SIGMA = {
    ("aux_loss", "wikipedia"): 0.47,
    ("aux_loss_free", "wikipedia"): 0.97,
    ("aux_loss_free", "github"): 1.6,
    ("aux_loss_free", "dm_mathematics"): 1.85,
}
"""One sigma per map whose loads are Gaussian logits; the other two have hot experts."""
_RANKS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]) - 1


def checks() -> Iterator[Check]:
    """Checks against the decoded loads."""
    yield from _gaussian()
    yield from _hot()
    yield from _mixtures()
    yield from _sequence_loss()
    yield from _closed_forms()
    yield from _ranks()
    yield from _steps()


@cache
def loads(model: str, domain: str) -> FloatArray:
    """Load relative to the mean [layers, experts]."""
    load = ReplayLoad(kind="replay", file=FILE, where={"model": model, "domain": domain})
    return np.asarray(recorded(load, LAYERS, EXPERTS, TOP_K)[0] * EXPERTS / TOP_K)


def drop(relative: FloatArray, factor: float) -> float:
    """Dropped share of relative loads [..., experts] under a capacity factor, mean over layers."""
    return float(np.maximum(relative - factor, 0.0).mean())


def _model(sigma: float, hot: HotExperts | None = None, layers: int = 60 * LAYERS) -> FloatArray:
    """Relative loads [layers, experts] of the statistical model."""
    load = LogitLoad(kind="logits", population=sigma, hot_experts=hot)
    rng = np.random.default_rng(12)
    chances = draw_tendencies(load, layers, EXPERTS, TOP_K, rng).chances(1, 1.0, rng)
    return np.asarray(chances[0] * EXPERTS / TOP_K)


def _gaussian() -> Iterator[Check]:
    for (model, domain), sigma in SIGMA.items():
        real, drawn = loads(model, domain), _model(sigma)
        name = f"{model}, {domain}, sigma {sigma}"
        yield within("real loads", f"{name}: CV", float(cv(real).mean()), float(cv(drawn).mean()), "", 0.07, SOURCE)
        yield within(
            "real loads", f"{name}: dropped at 1.25", 100 * drop(real, 1.25), 100 * drop(drawn, 1.25), "%", 0.1, SOURCE
        )
        yield within(
            "real loads",
            f"{name}: MaxVio",
            float(violation(real).mean()),
            float(violation(drawn).mean()),
            "",
            0.3,
            SOURCE,
        )


def fit_hot(real: FloatArray) -> tuple[float, HotExperts | None]:
    """Sigma, and number and load of hot experts, that come closest to the sorted loads in logarithms."""
    target = _curve(real)

    def miss(sigma: float, hot: HotExperts | None) -> float:
        return float(np.square(_curve(_model(sigma, hot, layers=100)) - target).sum())

    grid = product((1, 2, 3), np.arange(1.6, 5.0, 0.2).round(1).tolist())
    hots: list[HotExperts | None] = [None, *(HotExperts(count=count, load=load) for count, load in grid)]
    sigmas: list[float] = np.arange(0.1, 0.6, 0.04).round(2).tolist()
    return min(product(sigmas, hots), key=lambda pair: miss(*pair))


def _curve(relative: FloatArray) -> FloatArray:
    """Mean logarithm of the load at some ranks."""
    falling = -np.sort(-relative, axis=-1)[:, _RANKS]
    return np.asarray(np.log(np.maximum(falling, 1e-3)).mean(0))


def _hot() -> Iterator[Check]:
    """Fitted on odd layers, judged on even ones."""
    for domain in ("github", "dm_mathematics"):
        real = loads("aux_loss", domain)
        sigma, hot = fit_hot(real[0::2])
        even, drawn = real[1::2], _model(sigma, hot)
        what = f"{hot.count} hot expert of {hot.load:g}" if hot else "no hot expert"
        name = f"aux_loss, {domain}, even layers from odd ones (sigma {sigma:g}, {what})"
        yield within(
            "real loads", f"{name}: dropped at 1.25", 100 * drop(even, 1.25), 100 * drop(drawn, 1.25), "%", 0.2, SOURCE
        )
        yield within(
            "real loads",
            f"{name}: MaxVio",
            float(violation(even).mean()),
            float(violation(drawn).mean()),
            "",
            0.2,
            SOURCE,
        )


def _mixtures() -> Iterator[Check]:
    """The variance law on mixtures of recorded domains: its two spreads from odd layers, judged on even ones.

    What two domains share is the mean product of their deviations, CV_pop^2; the rest of a domain's variance is its
    own.
    """
    source = f"{SOURCE}; CV^2 = CV_pop^2 + CV_dom^2 / n"
    for model in MODELS:
        deviations = np.stack([loads(model, domain) for domain in DOMAINS]) - 1.0
        odd, even = deviations[:, 0::2], deviations[:, 1::2]
        shared = max(0.0, float(np.mean([(odd[a] * odd[b]).mean() for a, b in combinations(range(3), 2)])))
        own = float(np.square(odd).mean()) - shared
        for mixed in (2, 3):
            mixtures = [even[list(chosen)].mean(0) for chosen in combinations(range(3), mixed)]
            real = float(np.sqrt(np.square(mixtures).mean()))
            law = closed_forms.batch_cv(np.sqrt(shared), np.sqrt(own), mixed)
            name = f"{model}: CV of {mixed} domains mixed alike, even layers from odd ones"
            yield within("variance law", name, real, law, "", 0.1, source)


def _sequence_loss() -> Iterator[Check]:
    """Preferences of documents under the sequence-wise loss: sigma of the loss-free maps shrunk, against the others.

    Each map's sigma is the one with its CV; means over domains are geometric.
    """
    with_loss, free = (
        float(np.exp(np.mean([np.log(_sigma_of(float(cv(loads(model, domain)).mean()))) for domain in DOMAINS])))
        for model in MODELS
    )
    plain = Tendencies(np.zeros((1, EXPERTS)), TOP_K, domain=free)
    reached = shrunk(plain, [Remedy(kind="sequence", weight=1e-3)], 1).domain
    name = "sigma of documents under the sequence-wise loss, from that without (in-sample, weight 1e-3 assumed)"
    yield within("losses", name, with_loss, reached, "", 0.1, SOURCE)


def _sigma_of(spread: float) -> float:
    """Sigma of Gaussian logits whose loads have a CV."""
    noise = np.random.default_rng(14).standard_normal((500, EXPERTS))
    return float(brentq(lambda sigma: float(cv(chances_of(sigma * noise, TOP_K)).mean()) - spread, 0.01, 5.0))


def _closed_forms() -> Iterator[Check]:
    """One number (CV) per map: lognormal for weak skew, Dirichlet for strong skew."""
    lognormal, dirichlet = (0.090, 0.065, 0.067, 0.228, 0.347, 0.370), (0.091, 0.065, 0.067, 0.263, 0.452, 0.496)
    for (model, domain), first, second in zip(product(MODELS, DOMAINS), lognormal, dirichlet, strict=True):
        spread = float(cv(loads(model, domain)).mean())
        name = f"{model}, {domain}, dropped at 1.25 from its CV"
        reached = 100 * closed_forms.lognormal_drop(spread, 1.25)
        yield within("real loads", f"{name}: lognormal form", 100 * first, reached, "%", 0.04, "closed form")
        reached = 100 * closed_forms.dirichlet_drop(spread, EXPERTS, 1.25)
        yield within("real loads", f"{name}: Dirichlet form", 100 * second, reached, "%", 0.04, "closed form")
        real = 100 * drop(loads(model, domain), 1.25)
        best = reached if model == "aux_loss_free" else 100 * closed_forms.lognormal_drop(spread, 1.25)
        tolerance = None if domain == "dm_mathematics" and model == "aux_loss" else 0.06 * real
        yield near("real loads", f"{name}: the fitting form against the record", real, best, "%", tolerance, SOURCE)


def _ranks() -> Iterator[Check]:
    """Busiest of 4, 8 and 16 expert ranks that hold contiguous experts, and what placement by load makes of it."""
    table = {
        ("aux_loss", "wikipedia"): (1.12, 1.24, 1.50),
        ("aux_loss", "github"): (1.10, 1.22, 1.46),
        ("aux_loss", "dm_mathematics"): (1.11, 1.27, 1.57),
        ("aux_loss_free", "wikipedia"): (1.28, 1.52, 1.99),
        ("aux_loss_free", "github"): (1.44, 1.91, 2.68),
        ("aux_loss_free", "dm_mathematics"): (1.46, 2.00, 3.09),
    }
    for (model, domain), published in table.items():
        counts = (loads(model, domain) * 1e6).astype(np.int64)
        for ranks, expected in zip((4, 8, 16), published, strict=True):
            slowest = float(slowest_over_mean(contiguous(LAYERS, EXPERTS, ranks), counts).mean())
            name = f"{model}, {domain}, busiest of {ranks} ranks over mean"
            yield within("real loads", name, expected, slowest, "", 0.02, SOURCE)
            moved = float(slowest_over_mean(balanced(counts, ranks), counts).mean())
            copied = float(slowest_over_mean(balanced(counts, ranks, redundant=16), counts).mean())
            yield at_most("real loads", f"{name}, placed by load", slowest, moved, "", "greedy packing")
            limit = max(moved, CLOSE_ENOUGH)  # placement stops there
            yield at_most(
                "real loads", f"{name}, placed by load with 16 copies", limit, copied, "", "greedy replication"
            )


def _steps() -> Iterator[Check]:
    """The record in a training step: its drops, and the step time of the statistical model beside it."""
    base = load_scenario("recorded-load")
    for model, domain in product(MODELS, ("wikipedia", "github")):
        record = {
            "routing.load": {"kind": "replay", "file": FILE, "where": {"model": model, "domain": domain}},
            "routing.capacity_factor": 1.25,
        }
        real = loads(model, domain)
        step = simulate_step(load_scenario("recorded-load", record), "max-plus")
        assert step.load is not None
        name = f"{model}, {domain}, replayed through a step of {base.model.name}"
        yield within(
            "real loads",
            f"{name}: dropped at 1.25",
            100 * drop(real, 1.25),
            100 * step.load.dropped_fraction,
            "%",
            0.02,
            SOURCE,
        )
        dropless = {**record, "routing.capacity_factor": None}
        recorded_s = simulate_step(load_scenario("recorded-load", dropless), "max-plus").seconds
        if (model, domain) in SIGMA:
            drawn = {"kind": "logits", "population": SIGMA[model, domain]}
        else:
            sigma, hot = fit_hot(real)
            drawn = {"kind": "logits", "population": sigma, "hot_experts": hot.model_dump() if hot else None}
        modelled = [
            simulate_step(
                load_scenario("recorded-load", {**dropless, "routing.load": drawn, "routing.seed": seed}), "max-plus"
            ).seconds
            for seed in range(3)
        ]
        yield within(
            "real loads",
            f"{name}: dropless step, statistical model",
            recorded_s,
            float(np.mean(modelled)),
            "s",
            0.05,
            "the recorded load",
        )


__all__ = ["DOMAINS", "FILE", "MODELS", "SIGMA", "checks", "drop", "fit_hot", "loads"]
