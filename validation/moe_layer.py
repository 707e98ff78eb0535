"""A Mixture-of-Experts layer in PyTorch, in the pieces that a cost model counts.

One forward pass over T tokens of width h, E experts of inner width f, k choices of a token::

    router_logits   x [T, h]                      -> logits [T, E]
    route           logits                        -> experts and weights [T, k]
    plan            experts                       -> who is accepted, and the row of each assignment
    permute         x, plan                       -> rows [R, h], expert after expert
    expert_ffn      rows: up, activation, down    -> rows [R, h]
    combine         rows, weights, plan           -> y [T, h]
    shared_ffn      x                             -> added to y

With a capacity factor an expert accepts C assignments of a capacity group and drops the rest. The layer returns the
routed and shared output alone: where all experts of a token drop it, that is 0 (or the shared experts' output), and the
residual connection around the layer carries the token on.

The contracts of the simulator describe the layer, so that one scenario can be estimated and run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simulator.routing import capacity
from simulator.routing.remedies import DEFAULT_GAMMA
from simulator.routing.routers import check, hash_table
from simulator.spec.model import MixtureOfExperts
from simulator.spec.routing import Remedy
from validation.dispatch import Plan, combine, permute, plan
from validation.expert_ffn import Experts, FeedForward, Form
from validation.torch_balance import Routed, bias_step, losses
from validation.torch_routers import Choices, Draws, choose, draw, noisy


@dataclass(frozen=True)
class LayerShape:
    """What a layer is and how it is computed.

    ``capacity_factor`` None = dropless. ``capacity_group_tokens``: tokens that share one capacity; None = all of a
    call. ``drop_order`` says who is dropped, as in :mod:`simulator.routing.admission`. ``remedies`` are the losses to
    compute and the bias step. ``devices`` hold equal runs of experts, for the losses that count devices.
    ``vocabulary_size`` is for hash routers.
    """

    hidden_size: int
    moe: MixtureOfExperts
    capacity_factor: float | None = None
    capacity_counts_top_k: bool = True
    capacity_group_tokens: int | None = None
    drop_order: Literal["arrival", "score", "random"] = "arrival"
    form: Form = "loop"
    fp8: bool = False
    remedies: tuple[Remedy, ...] = ()
    devices: int = 1
    vocabulary_size: int | None = None

    def __post_init__(self) -> None:
        moe, biased = self.moe, self.moe.router.selection_bias
        check(moe.router, moe.experts, moe.top_k, (moe.experts,) if biased else None)
        if self.form == "padded" and self.capacity_factor is None:
            raise ValueError("the padded form pads to a capacity: it needs capacity_factor")
        if moe.experts % self.devices:
            raise ValueError(f"{moe.experts} experts do not divide over {self.devices} devices")
        if moe.router.kind == "hash" and self.vocabulary_size is None:
            raise ValueError("a hash router needs vocabulary_size")
        if any(remedy.kind == "bias" for remedy in self.remedies) and not biased:
            raise ValueError("the bias remedy needs a router with selection_bias")

    def groups(self, tokens: int) -> int:
        """Capacity groups of a call with so many tokens."""
        return max(1, round(tokens / self.capacity_group_tokens)) if self.capacity_group_tokens else 1

    def capacity(self, tokens: int) -> int | None:
        """Slots of an expert in one capacity group; None = no limit."""
        if self.capacity_factor is None:
            return None
        size, top_k, by_k = round(tokens / self.groups(tokens)), self.moe.top_k, self.capacity_counts_top_k
        return capacity.slots(self.capacity_factor, size, top_k, self.moe.experts, counts_top_k=by_k)


@dataclass(frozen=True)
class Logits:
    """What the router's matrices give.

    ``experts`` [T, E]; ``noise`` [T, E] of noisy top-k; ``groups`` and ``group_noise`` [T, branching] of the first of
    two levels.
    """

    experts: Tensor
    noise: Tensor | None = None
    groups: Tensor | None = None
    group_noise: Tensor | None = None

    def drawn(self, draws: Draws) -> Logits:
        """With their noise, where some is drawn."""
        experts, groups = self.experts, self.groups
        if self.noise is not None and draws.normal is not None:
            experts = noisy(experts, self.noise, draws.normal)
        if groups is not None and self.group_noise is not None and draws.group_normal is not None:
            groups = noisy(groups, self.group_noise, draws.group_normal)
        return Logits(experts, self.noise, groups, self.group_noise)


@dataclass(frozen=True)
class Output:
    """Output of a layer: ``y`` as the input, weighted ``losses`` by kind, and what became of the tokens.

    ``assigned``, ``processed``, ``dropped`` [E]; ``lost`` [T]: tokens that all their experts dropped.
    """

    y: Tensor
    losses: dict[str, Tensor]
    choices: Choices
    plan: Plan

    @property
    def dropped(self) -> Tensor:
        """Dropped assignments of each expert [E]."""
        return self.plan.assigned - self.plan.processed

    @property
    def lost(self) -> Tensor:
        """Tokens that were routed and lost all their experts [T]."""
        return (self.choices.experts >= 0).any(1) & ~self.plan.accepted.any(1)


class MoELayer(nn.Module):
    """Router, experts and shared experts; ``dtype`` is that of the experts, the router computes in fp32 at least."""

    def __init__(
        self, shape: LayerShape, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.shape, moe, width = shape, shape.moe, shape.hidden_size
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        routed = {**factory, "dtype": torch.promote_types(dtype, torch.float32)}
        kind, branching = moe.router.kind, moe.router.branching

        def matrix(outputs: int, wanted: bool) -> nn.Linear | None:
            return nn.Linear(width, outputs, bias=False, **routed) if wanted else None

        self.router = matrix(moe.experts, kind != "hash")
        self.router_noise = matrix(moe.experts, kind == "noisy_top_k")
        self.group_router = matrix(branching or 1, branching is not None)
        self.group_noise = matrix(branching or 1, branching is not None and kind == "noisy_top_k")
        biased = torch.zeros(moe.experts, **routed) if moe.router.selection_bias else None
        self.bias = None if biased is None else nn.Parameter(biased, requires_grad=False)  # moved by update_bias alone
        runs = math.ceil((shape.vocabulary_size or 0) / moe.experts)
        table = torch.from_numpy(hash_table(runs, moe.experts)).to(device) if kind == "hash" else None
        self.register_buffer("table", table, persistent=False)
        self.experts = Experts(width, moe, shape.form, fp8=shape.fp8, **factory)
        size, gated = moe.shared_ffn_size, moe.shared_experts and moe.shared_expert_gate
        self.shared = FeedForward(width, size, moe.activation, gated=moe.gated, **factory) if size else None
        self.shared_gate = nn.Linear(width, 1, bias=False, **factory) if gated else None

    def router_logits(self, x: Tensor) -> Logits:
        """Logits of tokens [T, h], in fp32 at least (Switch, arXiv 2101.03961, section 2.4)."""
        if self.router is None:
            format_ = torch.promote_types(x.dtype, torch.float32)
            return Logits(torch.zeros((), dtype=format_, device=x.device).expand(len(x), self.shape.moe.experts))
        x = x.to(self.router.weight.dtype)
        matrices = (self.router, self.router_noise, self.group_router, self.group_noise)
        return Logits(*(None if matrix is None else matrix(x) for matrix in matrices))

    def route(self, logits: Logits, *, token_ids: Tensor | None = None, draws: Draws | None = None) -> Choices:
        """Experts and weights of every token; ``draws`` by default at random, noise only while training."""
        router = self.shape.moe.router
        drawn = draw(router, logits.experts, noise=self.training) if draws is None else draws
        noised = logits.drawn(drawn)
        return choose(
            router,
            noised.experts,
            self.shape.moe.top_k,
            bias=self.bias,
            group_logits=noised.groups,
            token_ids=token_ids,
            table=self.table,
            uniform=drawn.uniform,
        )

    def plan(self, choices: Choices, priority: Tensor | None = None) -> Plan:
        """Capacity and rows; ``priority`` [T, k] of the drop order, by default the scores or a random number."""
        shape, tokens = self.shape, len(choices.experts)
        if priority is None and shape.drop_order == "score":
            priority = choices.scores.detach().gather(1, choices.experts.clamp_min(0))
        elif priority is None and shape.drop_order == "random":
            priority = torch.rand(choices.experts.shape, device=choices.experts.device)
        return plan(
            choices.experts,
            shape.moe.experts,
            shape.capacity(tokens),
            groups=shape.groups(tokens),
            priority=priority,
            padded=shape.form == "padded",
        )

    def expert_ffn(self, rows: Tensor, plan: Plan) -> Tensor:
        """Every row through its expert [R, h] -> [R, h]."""
        return self.experts(rows, plan.processed)

    def shared_ffn(self, x: Tensor) -> Tensor:
        """Every token through the shared experts, which are one wide feed-forward part [T, h] -> [T, h]."""
        assert self.shared is not None
        y = self.shared(x)
        return y if self.shared_gate is None else y * self.shared_gate(x).sigmoid()

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        logits: Logits | None = None,
        draws: Draws | None = None,
        priority: Tensor | None = None,
    ) -> Output:
        """Output for ``x`` [..., h]; with three or more dimensions the last but one is the sequence.

        ``logits`` replaces those of the router, ``draws`` and ``priority`` [T, k] what else would be random.
        """
        flat, ids = x.flatten(0, -2), None if token_ids is None else token_ids.flatten()
        logits = self.router_logits(flat) if logits is None else logits
        draws = draw(self.shape.moe.router, logits.experts, noise=self.training) if draws is None else draws
        choices = self.route(logits, token_ids=ids, draws=draws)
        planned = self.plan(choices, priority)
        y = combine(self.expert_ffn(permute(flat, planned), planned), choices.weights, planned)
        if self.shared is not None:
            y = y + self.shared_ffn(flat)
        return Output(y.view(x.shape), self._losses(choices, logits, draws, x.shape[-2]), choices, planned)

    def update_bias(self, counts: Tensor) -> None:
        """Move the selection bias by one step against ``counts`` [E], the assignments of one optimizer step."""
        for remedy in self.shape.remedies:
            if remedy.kind == "bias" and self.bias is not None:
                gamma = DEFAULT_GAMMA if remedy.gamma is None else remedy.gamma
                self.bias.copy_(bias_step(self.bias, counts, gamma))

    def _losses(self, choices: Choices, logits: Logits, draws: Draws, sequence_length: int) -> dict[str, Tensor]:
        shape = self.shape
        noised = logits.drawn(draws).experts if logits.noise is not None else None
        limit = shape.moe.router.group_limit or shape.devices
        routed = Routed(choices, logits.experts, noised, logits.noise, sequence_length, shape.devices, limit)
        return losses(shape.remedies, routed)


__all__ = ["LayerShape", "Logits", "MoELayer", "Output"]
