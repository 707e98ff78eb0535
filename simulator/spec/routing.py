"""The routing contract: capacity, what happens to overflow, and how the load of the experts is distributed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from simulator.spec.fields import (
    Contract,
    Correlation,
    Flag,
    Fraction,
    NonNegative,
    Positive,
    PositiveFraction,
    ProperFraction,
    Sigma,
    Whole,
    WholeOrZero,
    described,
)


class BalancedLoad(Contract):
    """Every expert is equally likely; counts still fluctuate as independent tokens do."""

    kind: Literal["balanced"] = described("Load model.", example="balanced", default="balanced")


class HotExperts(Contract):
    """A few experts whose load is a multiple of the mean."""

    count: Whole = described("Hot experts in each layer.", example=2)
    load: Positive = described("Their load relative to the mean.", example=2.5)


class Growth(Contract):
    """Popularity that builds up as favoured experts learn faster: logistic from a small start to `population`."""

    start: PositiveFraction = described("Share of `population` at step 0.", example=0.05, default=0.05)
    steps: Positive = described(
        "Time constant: steps in which a small popularity grows by e.", unit="steps", example=100
    )


class LogitLoad(Contract):
    """Expert logits per token: Gaussian tendencies in logit units plus unit Gumbel noise.

    The tendencies are what the router does by itself; `routing.balance` reins them in.
    """

    kind: Literal["logits"] = described("Load model.", example="logits")
    population: Sigma = described("Popularity fixed per layer: sigma_pop.", example=0.25, default=0.0)
    domain: Sigma = described("Preference of one document: sigma_dom.", example=0.45, default=0.0)
    documents: Whole | Literal["auto"] = described(
        "Independent documents in a microbatch of one expert group; auto = its sequences.", example=1, default="auto"
    )
    token: Sigma = described(
        "Preference fixed by token identity, token frequencies after Zipf: sigma_tok.", example=0.6, default=0.0
    )
    context_correlation: Correlation = described(
        "AR(1) correlation of the noise of neighbouring tokens.", example=0.23, default=0.0
    )
    sticky: ProperFraction = described(
        "Probability of repeating the previous token's first choice.", example=0.08, default=0.0
    )
    hot_experts: HotExperts | None = described("A few hot experts.", example={"count": 2, "load": 2.5}, default=None)
    growth: Growth | None = described(
        "How popularity builds up over the training steps; null = it is there from the start.",
        example={"start": 0.05, "steps": 100},
        default=None,
    )
    drift: NonNegative = described(
        "Random walk of popularity: standard deviation per step, as a share of `population`.",
        unit="1/step",
        example=0.005,
        default=0.0,
    )


class DirichletLoad(Contract):
    """Expert shares drawn from a symmetric Dirichlet distribution, fixed per layer."""

    kind: Literal["dirichlet"] = described("Load model.", example="dirichlet")
    concentration: Positive = described("Concentration per expert; large = balanced.", example=10.0)


class ReplayLoad(Contract):
    """Recorded counts [step, layer, expert], scaled to the tokens of the scenario.

    Recorded steps stand for microbatches, of more steps evenly spaced ones; the layers of an encoder come first.
    """

    kind: Literal["replay"] = described("Load model.", example="replay")
    file: str = described(
        "CSV with the columns layer, expert, one of count, load or relative_load, and if need be step; or npz with an "
        "array [step, layer, expert]. Relative to the scenario file.",
        example="loads.npz",
    )
    where: dict[str, str | int] = described(
        "Rows of a CSV to use: other column to value.", example={"domain": "github"}, default=dict
    )
    sampled: Flag = described(
        "Draw counts with the recorded shares, instead of the recorded shares as they are.", example=True, default=False
    )


class Remedy(Contract):
    """One balancing mechanism."""

    kind: Literal["importance", "load", "load_balance", "z", "device", "communication", "sequence", "bias"] = described(
        "Mechanism: importance and load losses (1701.06538), load-balance loss (2101.03961), router z-loss "
        "(2202.08906), device and communication losses (2405.04434), sequence-wise loss and bias (2412.19437).",
        example="bias",
    )
    weight: NonNegative | None = described("Weight of the loss; default: its paper's.", example=0.01, default=None)
    gamma: NonNegative | None = described("Step of the bias controller; default 0.001.", example=0.001, default=None)


class Placement(Contract):
    """Which rank holds which expert."""

    kind: Literal["contiguous", "balanced"] = described(
        "contiguous: by number; balanced: packed by expected load, heaviest first; a recording of several steps shows "
        "the first half of them beforehand and runs the others.",
        example="balanced",
        default="contiguous",
    )
    redundant_experts: WholeOrZero = described(
        "Further slots of a layer for copies of its most loaded experts (balanced only).", example=32, default=0
    )


Load = Annotated[BalancedLoad | LogitLoad | DirichletLoad | ReplayLoad, Field(discriminator="kind")]


class Routing(Contract):
    """How tokens meet experts during the run."""

    capacity_factor: Positive | Literal["model"] | None = described(
        "null = dropless; a number; or model = the preset's.", example=1.25, default=None
    )
    capacity_factor_evaluation: Positive | Literal["model"] | None = described(
        "Capacity factor at evaluation: what it drops is reported; no cost in training.", example=2.0, default=None
    )
    capacity_group_tokens: Whole | Literal["auto", "model"] = described(
        "Tokens that share one capacity; auto = the tokens of `capacity_scope`. With one-hot dispatch the most: groups "
        "are as large as they can be on one rank.",
        unit="tokens",
        example=8192,
        default="auto",
    )
    capacity_scope: Literal["rank", "group", "global"] = described(
        "Who shares a capacity: one source rank, the expert group, or all data-parallel ranks.",
        example="group",
        default="group",
    )
    capacity_over: Literal["model", "expert", "device"] = described(
        "What a capacity limits: each expert, or the sum over the experts of a device (one of "
        "`model.moe.router.groups`; 2405.04434); model = as the preset's training did.",
        example="device",
        default="model",
    )
    min_expert_capacity: Whole = described(
        "Slots that an expert has in each capacity group at least; 4 in Mesh-TensorFlow and DeepSpeed-MoE.",
        example=4,
        default=1,
    )
    capacity_counts_top_k: Flag = described(
        "Capacity = factor x tokens x top_k / experts (else without top_k).", example=True, default=True
    )
    dispatch: Literal["gather", "one_hot"] = described(
        "How tokens reach their experts' slots and come back: gathered by index, or by two products with one-hot masks "
        "[tokens of a capacity group, experts x slots], as in GShard (2006.16668), Mesh-TensorFlow and DeepSpeed-MoE.",
        example="one_hot",
        default="gather",
    )
    pad_to_capacity: Flag = described("Padded slots are computed and sent.", example=True, default=False)
    merge_copies: Flag = described(
        "One copy of a token goes to each node and each rank that holds any of its experts, as in DeepEP; else one to "
        "every expert, as in an all-to-all of permuted rows (Megatron-Core's default). Padded slots never merge.",
        example=False,
        default=True,
    )
    overflow: Literal["drop", "reroute", "none"] = described(
        "Assignments over capacity: dropped to the residual path, moved to experts with room, or kept.",
        example="drop",
        default="drop",
    )
    drop_order: Literal["arrival", "score", "random"] = described(
        "Which tokens are dropped: the last to arrive, those of the lowest score, or any. Their number is the same.",
        example="arrival",
        default="arrival",
    )
    exempt_sequence_fraction: Fraction = described(
        "Sequences whose tokens are never dropped.", example=0.1, default=0.0
    )
    load: Load = described(
        "How the load is distributed; a hash router's is that of its table instead of a balanced one.",
        example={"kind": "balanced"},
        default=BalancedLoad,
    )
    balance: tuple[Remedy, ...] = described(
        "Balancing mechanisms that act on `load`.", example=[{"kind": "bias"}], default=()
    )
    at_step: WholeOrZero | None = described(
        "Optimizer step at which the load is looked at; null = after it has settled.",
        unit="steps",
        example=200,
        default=None,
    )
    placement: Placement = described("Experts on ranks.", example={"kind": "balanced"}, default=Placement)
    seed: WholeOrZero = described("Seed of the random draws.", example=0, default=0)

    @property
    def merges(self) -> bool:
        """Whether copies of a token that go to one place travel as one."""
        return self.merge_copies and not self.pad_to_capacity
