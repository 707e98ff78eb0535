"""Routers, capacity and losses of the simulator (numpy) against those of the reference layer (PyTorch).

The same logits must choose the same experts, drop the same assignments and give the same losses: the simulator then
routes as a real layer does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.routing import balance, capacity, load, routers
from simulator.routing.admission import admit
from simulator.spec.model import MixtureOfExperts, Router
from simulator.spec.routing import Remedy
from validation import torch_balance, torch_routers
from validation.dispatch import plan
from validation.moe_layer import LayerShape, Logits, MoELayer
from validation.torch_routers import Draws

torch.set_num_threads(1)  # tensors are small, and other tests run beside

Floats = npt.NDArray[np.float64]
WEIGHTS = st.sampled_from(["before_top_k", "after_top_k", "renormalized"])
SCALINGS = st.sampled_from([1.0, 2.5])
SEEDS = st.integers(0, 2**32 - 1)


@dataclass
class Case:
    """A router and its inputs, the same numbers for both libraries."""

    router: Router
    logits: Floats
    top_k: int
    seed: int
    bias: Floats | None = None
    noise_logits: Floats | None = None
    group_logits: Floats | None = None
    token_ids: Any = None

    @property
    def tokens(self) -> int:
        return len(self.logits)

    def in_numpy(self) -> routers.Choices:
        return routers.choose(
            self.router,
            self.logits,
            self.top_k,
            bias=self.bias,
            noise_logits=self.noise_logits,
            group_logits=self.group_logits,
            token_ids=self.token_ids,
            rng=np.random.default_rng(self.seed),
        )

    def draws(self) -> Draws:
        """The random numbers that the numpy router draws, in its order."""
        rng = np.random.default_rng(self.seed)
        normal = rng.standard_normal(self.logits.shape) if self.router.kind == "noisy_top_k" else None
        uniform = rng.random(self.tokens) if self.router.second_choice == "random" else None
        return Draws(tensor(normal), None, tensor(uniform))

    def in_torch(self, dtype: torch.dtype = torch.float64) -> torch_routers.Choices:
        logits = Logits(tensor(self.logits, dtype), tensor(self.noise_logits), tensor(self.group_logits))
        drawn = self.draws()
        noised = logits.drawn(drawn)
        return torch_routers.choose(
            self.router,
            noised.experts,
            self.top_k,
            bias=tensor(self.bias),
            group_logits=noised.groups,
            token_ids=tensor(self.token_ids, None),
            uniform=drawn.uniform,
        )


def tensor(array: Any, dtype: torch.dtype | None = torch.float64) -> Any:
    return None if array is None else torch.as_tensor(array, dtype=dtype)


def some_logits(draw: st.DrawFn, experts: int, *, ties: bool) -> tuple[Floats, int]:
    """Logits of up to 40 tokens in fp32 numbers, near each other or far apart, with ties if wanted; and their seed."""
    seed = draw(SEEDS)
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((draw(st.integers(0, 40)), experts)) * draw(st.sampled_from([0.5, 3.0, 30.0]))
    logits = logits.round() if ties and draw(st.booleans()) else logits
    return logits.astype(np.float32).astype(np.float64), seed


@st.composite
def token_choice(draw: st.DrawFn, kinds: tuple[str, ...] = ("softmax", "sigmoid", "noisy_top_k")) -> Case:
    """Flat top-k, noisy or not, with ties or a bias, in groups, or with a random second choice."""
    kind: Any = draw(st.sampled_from(kinds))
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    limit = draw(st.one_of(st.none(), st.integers(1, groups)))
    top_k = draw(st.integers(1, size * (limit or groups)))
    biased = draw(st.booleans())
    logits, seed = some_logits(draw, groups * size, ties=limit is None and not biased)
    router = Router(
        kind=kind,
        weights=draw(WEIGHTS),
        groups=groups,
        group_limit=limit,
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
        scaling=draw(SCALINGS),
        second_choice=draw(st.sampled_from(["always", "random"])) if top_k == 2 else "always",
    )
    rng = np.random.default_rng(seed + 1)
    bias = rng.standard_normal(groups * size) if biased else None
    noise = rng.standard_normal(logits.shape) if kind == "noisy_top_k" else None
    return Case(router, logits, top_k, seed, bias, noise)


@st.composite
def switch(draw: st.DrawFn) -> Case:
    logits, seed = some_logits(draw, draw(st.integers(1, 20)), ties=True)
    return Case(Router(kind="switch", scaling=draw(SCALINGS)), logits, 1, seed)


@st.composite
def two_levels(draw: st.DrawFn) -> Case:
    """Two-level gating with the first level of its own or from the groups; noisy or not."""
    branching, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    each = draw(st.integers(1, min(branching, size)))
    logits, seed = some_logits(draw, branching * size, ties=False)
    kind: Any = draw(st.sampled_from(["softmax", "noisy_top_k"]))
    router = Router(kind=kind, weights=draw(WEIGHTS), branching=branching, scaling=draw(SCALINGS))
    rng = np.random.default_rng(seed + 1)
    groups = rng.standard_normal((len(logits), branching)) if draw(st.booleans()) else None
    noise = rng.standard_normal(logits.shape) if kind == "noisy_top_k" else None
    return Case(router, logits, each**2, seed, noise_logits=noise, group_logits=groups)


@st.composite
def expert_choice(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 20))
    logits, seed = some_logits(draw, experts, ties=True)
    return Case(Router(kind="expert_choice", scaling=draw(SCALINGS)), logits, draw(st.integers(1, experts)), seed)


@st.composite
def hashed(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 20))
    ids = np.array(draw(st.lists(st.integers(0, 500), min_size=1, max_size=40)))
    router = Router(kind="hash", scaling=draw(SCALINGS))
    return Case(router, np.zeros((len(ids), experts)), draw(st.integers(1, experts)), 0, token_ids=ids)


def assert_equal(case: Case) -> None:
    ours, theirs = case.in_numpy(), case.in_torch()

    assert theirs.experts.tolist() == ours.experts.tolist()
    assert theirs.counts.tolist() == ours.counts.tolist()
    assert np.allclose(theirs.weights.numpy(), ours.weights, rtol=1e-12, atol=1e-300)
    assert np.allclose(theirs.scores.numpy(), ours.scores, rtol=1e-12, atol=1e-300)


# Choices


@settings(deadline=None, max_examples=150)
@given(token_choice())
def test_tokens_choose_the_same_experts(case: Case) -> None:
    assert_equal(case)


@settings(deadline=None, max_examples=30)
@given(switch())
def test_a_switch_is_the_same(case: Case) -> None:
    assert_equal(case)


@settings(deadline=None, max_examples=60)
@given(two_levels())
def test_two_levels_choose_the_same_experts(case: Case) -> None:
    assert_equal(case)


@settings(deadline=None, max_examples=60)
@given(expert_choice())
def test_experts_choose_the_same_tokens(case: Case) -> None:
    assert_equal(case)


@settings(deadline=None, max_examples=30)
@given(hashed())
def test_ids_have_the_same_hash(case: Case) -> None:
    assert_equal(case)


@settings(deadline=None, max_examples=60)
@given(st.one_of(token_choice(kinds=("softmax", "sigmoid")), expert_choice()))
def test_logits_in_fp32_choose_what_the_same_numbers_choose_in_fp64(case: Case) -> None:
    """The simulator computes in float64, a layer's router in fp32: where keys are computed, they are so in float64."""
    if case.router.second_choice == "always":
        single = case.in_torch(torch.float32)

        assert single.weights.dtype == torch.float32
        assert single.experts.tolist() == case.in_numpy().experts.tolist()


def test_saturated_sigmoids_in_fp32_are_still_told_apart() -> None:
    """Logits 20 and 21 have the same sigmoid in fp32; with a bias the selection sorts by sigmoids."""
    case = Case(Router(kind="sigmoid"), np.array([[20.0, 21.0, 0.0]]), 1, 0, bias=np.zeros(3))

    assert case.in_numpy().experts.tolist() == [[1]]
    assert case.in_torch(torch.float32).experts.tolist() == [[1]]
    in_fp32 = torch_routers.choose(case.router, tensor(case.logits, torch.float32), 1, bias=torch.zeros(3))
    assert in_fp32.experts.tolist() == [[1]]


def test_a_layer_hashes_by_the_table_of_the_simulator() -> None:
    moe = MixtureOfExperts(experts=6, top_k=2, expert_ffn_size=8, router=Router(kind="hash"))
    ids = np.random.default_rng(0).integers(0, 100, 40)
    output = MoELayer(LayerShape(4, moe, vocabulary_size=100))(torch.randn(40, 4), token_ids=torch.from_numpy(ids))
    expected = routers.choose(moe.router, np.zeros((40, 6)), 2, token_ids=ids)

    assert output.choices.experts.tolist() == expected.experts.tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), max_size=8), st.integers(0, 6))
def test_the_largest_keys_are_the_same_with_any_number_of_ties(rows: list[list[int]], count: int) -> None:
    keys = np.array(rows, dtype=np.float64).reshape(-1, 6)

    assert torch_routers.top(torch.from_numpy(keys), count).tolist() == routers.top(keys, count).tolist()


# Drops


@st.composite
def served(draw: st.DrawFn) -> dict[str, Any]:
    """Choices of up to 40 tokens, some of them absent, with slots, groups and priorities that may tie."""
    total = draw(st.integers(1, 9))
    top_k, tokens = draw(st.integers(1, total)), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(SEEDS))
    liking = draw(st.sampled_from([0.0, 2.0])) * rng.standard_normal(total) + rng.gumbel(size=(tokens, total))
    choices = np.argsort(-liking, axis=-1)[:, :top_k]
    scores = np.take_along_axis(liking, choices, axis=-1).round(draw(st.sampled_from([0, 9])))
    return {
        "experts": np.where(rng.random(choices.shape) < draw(st.sampled_from([0.0, 0.2])), -1, choices),
        "total": total,
        "slots": draw(st.one_of(st.none(), st.integers(1, 12))),
        "groups": draw(st.integers(1, 4)),
        "scores": draw(st.sampled_from([None, scores])),
    }


@settings(deadline=None, max_examples=150)
@given(served(), st.booleans())
def test_who_is_dropped_is_the_same_and_rows_hold_all_others_expert_after_expert(
    case: dict[str, Any], padded: bool
) -> None:
    experts, total, slots, groups, scores = (case[key] for key in ("experts", "total", "slots", "groups", "scores"))
    order: Any = "arrival" if scores is None else "score"
    ours = admit(experts, slots, order=order, scores=scores, groups=groups, total=total)
    found = plan(torch.from_numpy(experts), total, slots, groups=groups, priority=tensor(scores), padded=padded)

    assert found.accepted.tolist() == ours.accepted.tolist()
    assert found.assigned.tolist() == ours.assigned.tolist()
    assert found.processed.tolist() == ours.processed.tolist()
    assert (found.assigned - found.processed).sum() == ours.dropped.sum()
    assert sorted(found.places.tolist()) == np.flatnonzero(ours.accepted).tolist()
    assert (found.rows.diff() > 0).all()
    if padded and slots is not None:
        assert (found.rows // (groups * slots)).tolist() == experts.ravel()[found.places.numpy()].tolist()
        assert found.size == total * groups * slots
    else:
        assert found.rows.tolist() == list(range(found.size))
        assert np.diff(experts.ravel()[found.places.numpy()]).min(initial=0) >= 0


@pytest.mark.parametrize("order", ["arrival", "score"])
@pytest.mark.parametrize("group_tokens", [None, 100])
def test_a_layer_drops_what_the_simulator_drops_for_its_logits(order: Any, group_tokens: int | None) -> None:
    """A whole layer, 400 tokens, skewed logits, capacity factor 1: the same tokens lose the same experts."""
    moe = MixtureOfExperts(experts=16, top_k=3, expert_ffn_size=8, router=Router(weights="after_top_k"))
    shape = LayerShape(8, moe, 1.0, capacity_group_tokens=group_tokens, drop_order=order, form="padded")
    rng = np.random.default_rng(5)
    logits = rng.standard_normal(16) + rng.gumbel(size=(400, 16))
    ours = routers.choose(moe.router, logits, 3)
    limit = capacity.slots(1.0, group_tokens or 400, 3, 16)
    scores = np.take_along_axis(ours.scores, ours.experts, axis=1)
    expected = admit(ours.experts, limit, order=order, scores=scores, groups=400 // (group_tokens or 400), total=16)

    output = MoELayer(shape, dtype=torch.float64)(torch.randn(400, 8).double(), logits=Logits(tensor(logits)))

    assert output.choices.experts.tolist() == ours.experts.tolist()
    assert output.plan.accepted.tolist() == expected.accepted.tolist()
    assert output.dropped.tolist() == (expected.assigned - expected.processed).tolist()
    assert output.dropped.sum() > 100
    assert output.lost.double().mean() == expected.lost_fraction


@pytest.mark.parametrize(("experts", "top_k", "tokens", "factor"), [(8, 2, 256, 1.0), (16, 1, 256, 1.25)])
def test_drops_of_random_logits_have_the_distribution_of_the_simulators_own_draw(
    experts: int, top_k: int, tokens: int, factor: float
) -> None:
    """1000 batches on either side: mean and standard deviation of the dropped assignments agree.

    Independent tokens with even chances in both; four standard errors of a mean, 15 % of a standard deviation.
    """
    batches = 1000
    generator = torch.Generator().manual_seed(1)
    limit = capacity.slots(factor, tokens, top_k, experts)
    logits = torch.randn(batches * tokens, experts, generator=generator)
    chosen = torch_routers.choose(Router(), logits, top_k).experts
    found = plan(chosen, experts, limit, groups=batches)
    real = (~found.accepted).view(batches, -1).sum(1).double().numpy()
    even = np.full((batches, experts), top_k / experts)
    counts = load.draw(even, tokens, top_k, np.random.default_rng(1))
    simulated = capacity.apply(counts, limit).dropped.sum(-1)
    spread = max(real.std(), simulated.std())

    assert real.mean() > 1.0
    assert abs(real.mean() - simulated.mean()) < 4.0 * spread * (2.0 / batches) ** 0.5
    assert abs(real.std() - simulated.std()) < 0.15 * spread


# Losses and the bias


@settings(deadline=None, max_examples=80)
@given(st.one_of(token_choice(), two_levels(), expert_choice(), hashed()), SEEDS)
def test_losses_have_the_same_values(case: Case, seed: int) -> None:
    if not case.tokens or case.in_numpy().experts.shape[1] == 0:
        return
    ours, theirs = case.in_numpy(), case.in_torch()
    devices = next(number for number in (4, 3, 2, 1) if case.logits.shape[1] % number == 0)
    length = next(number for number in (5, 3, 2, 1) if case.tokens % number == 0)
    expected = {
        "importance": balance.importance_loss(ours, 0.1),
        "load_balance": balance.load_balance_loss(ours, 0.01),
        "z": balance.z_loss(case.logits, 0.001),
        "device": balance.device_loss(ours, devices, 0.05),
        "communication": balance.communication_loss(ours, devices, 2, 0.02),
        "sequence": balance.sequence_loss(ours, length, 0.0001),
    }
    noisy = noise = None
    if case.noise_logits is not None:
        rng = np.random.default_rng(seed)
        noised = routers.noisy(case.logits, case.noise_logits, rng)
        noisy, noise = tensor(noised), tensor(case.noise_logits)
        expected["load"] = balance.load_loss(case.logits, noised, case.noise_logits, ours.experts.shape[1], 0.1)
    remedies = [Remedy.model_validate({"kind": kind}) for kind in expected]
    routed = torch_balance.Routed(theirs, tensor(case.logits), noisy, noise, length, devices, 2)

    found = {kind: float(loss) for kind, loss in torch_balance.losses(remedies, routed).items()}

    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12), st.sampled_from(["sign", "proportional"]), SEEDS)
def test_bias_steps_are_the_same(counts: list[int], rule: Any, seed: int) -> None:
    bias = np.random.default_rng(seed).standard_normal(len(counts))
    expected = balance.bias_step(bias, np.array(counts), 0.01, rule)

    assert torch_balance.bias_step(tensor(bias), torch.tensor(counts), 0.01, rule).numpy() == pytest.approx(expected)
