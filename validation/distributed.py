"""Several processes: the all-to-all by itself, and a MoE layer whose experts are divided over ranks.

A rank has tokens of its own and some of the experts. It routes its tokens with a copy of the router, sends each row to
the rank of its expert (dispatch), computes what it received, and sends the results back (combine). The backward pass
does the same twice more, in the opposite direction: four all-to-alls. In the padded form every rank knows how much it
receives; otherwise the counts of the experts are exchanged first. Dispatch by all-to-all as in GShard (arXiv
2006.16668, section 3.2).

All ranks wait for each other before every repeat, and a repeat takes as long as its slowest rank. Processes talk by
gloo, or by NCCL where every rank has a GPU; with ``all_to_all_single``, since gloo refuses lists of uneven parts.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from math import ceil
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from validation.cases import Case
from validation.dispatch import combine, permute
from validation.expert_ffn import Experts
from validation.moe_layer import MoELayer
from validation.suites import Effort
from validation.torch_cold import Work, cold_copies, in_turn, with_fresh_outputs
from validation.torch_pieces import DTYPES, loaded_tokens, moe_layer, reference, run
from validation.torch_processes import Say, started

MOST_REPEATS = 500


class ExpertParallelLayer:
    """The layer of this rank: the whole router and shared experts, and its part of the routed experts."""

    def __init__(self, whole: MoELayer, rank: int, ranks: int) -> None:
        shape, up, down = whole.shape, whole.experts.up_weight, whole.experts.down_weight
        if shape.moe.experts % ranks:
            raise ValueError(f"{shape.moe.experts} experts do not divide over {ranks} ranks")
        self.ranks, self.held = ranks, shape.moe.experts // ranks
        moe, held = shape.moe.model_copy(update={"experts": self.held}), slice(rank * self.held, (rank + 1) * self.held)
        local = Experts(shape.hidden_size, moe, shape.form, fp8=shape.fp8, dtype=up.dtype, device=up.device)
        with torch.no_grad():
            local.up_weight.copy_(up[held])
            local.down_weight.copy_(down[held])
        whole.experts = local
        self.layer = whole

    def __call__(self, x: Tensor) -> Tensor:
        """Output [T, h] of the tokens [T, h] of this rank."""
        layer = self.layer
        choices = layer.route(layer.router_logits(x))
        planned = layer.plan(choices)
        counts, received = self.counts(planned.processed, planned.size)
        sent, got = ([sum(row) for row in each] for each in (counts, received))
        # Rows arrive rank after rank; the experts want them expert after expert.
        number = torch.tensor(received, device=x.device)  # [ranks, held]
        experts = torch.arange(self.held, device=x.device).repeat(self.ranks)
        order = experts.repeat_interleave(number.flatten()).argsort(stable=True)
        rows = exchange(permute(x, planned), sent, got).index_select(0, order)
        results = layer.experts(rows, number.sum(0))
        home = exchange(torch.empty_like(results).index_copy(0, order, results), got, sent)
        y = combine(home, choices.weights, planned)
        return y if layer.shared is None else y + layer.shared_ffn(x)

    def counts(self, processed: Tensor, size: int) -> tuple[list[list[int]], list[list[int]]]:
        """Rows that go to each expert of each rank, and that come from each rank to each expert here [ranks, held]."""
        if self.layer.shape.form == "padded":
            even = [[size // (self.ranks * self.held)] * self.held] * self.ranks
            return even, even
        received = torch.empty_like(processed)
        dist.all_to_all_single(received, processed)
        return processed.view(self.ranks, -1).tolist(), received.view(self.ranks, -1).tolist()


def exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """All-to-all of rows [R, h], ``sent`` and ``received`` rows by rank; its gradient goes the way back."""
    return _Exchange.apply(rows, list(sent), list(received))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.splits = sent, received
        return _exchanged(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.splits
        return _exchanged(gradient.contiguous(), received, sent), None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    output = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(output, rows, received, sent)
    return output


# --- what the ranks do ------------------------------------------------------------------------------------------------


def timings(cases: Sequence[Case], ranks: int, effort: Effort) -> Generator[tuple[str, list[float], float]]:
    """Key, seconds of the repeats and seconds of the reference kernel of every case, as they are finished.

    Raises:
        RuntimeError: a rank failed or was not heard of.
    """
    backend = cases[0].fields["backend"]
    yield from started(_time_all, ranks, backend, list(cases), effort)


def agreement(cases: Sequence[Case]) -> list[dict[str, float]]:
    """Largest difference of each divided layer from the whole layer on one rank, over the largest value, by tensor.

    Computed in float64, over the tokens of all ranks: the output, and the gradients of input and weights. A capacity
    holds for the tokens of each rank.

    Raises:
        RuntimeError: a rank failed or was not heard of.
    """
    return list(started(_compare_all, cases[0].fields["ranks"], "gloo", list(cases)))


def _time_all(rank: int, device: torch.device, say: Say, cases: Sequence[Case], effort: Effort) -> None:
    reference_work, parent = reference(device), os.getppid()
    for case in cases:
        if os.getppid() != parent:
            return
        work = _work(case, rank, device)
        seconds = _repeated(work, effort, device)
        around = _repeated(reference_work, Effort(0.0, 3, 0.0), device)
        if rank == 0:
            say((case.key, seconds, min(around)))


def _work(case: Case, rank: int, device: torch.device) -> Work:
    fields = case.fields
    ranks = fields["ranks"]
    if case.kind == "all_to_all":
        out, into = (
            [part // 4 for part in row] for row in (fields["sent"][rank], [row[rank] for row in fields["sent"]])
        )
        source, target = torch.ones(sum(out), device=device), torch.empty(sum(into), device=device)
        return lambda: dist.all_to_all_single(target, source, into, out)
    torch.manual_seed(0)  # the same router everywhere
    factory = {"device": device, "dtype": DTYPES[fields["form"]]}
    whole = moe_layer(fields, factory)
    torch.manual_seed(1 + rank)
    x = loaded_tokens(whole, fields, factory)
    layer = ExpertParallelLayer(whole, rank, ranks)
    turns = cold_copies(layer, whole.parameters())
    works = [run(fields, partial(each, x), [x, *each.layer.parameters()]) for each in turns]
    return with_fresh_outputs(in_turn(works), device)


def _repeated(work: Work, effort: Effort, device: torch.device) -> list[float]:
    """Seconds of each repeat on the slowest rank; all ranks repeat equally often."""
    work()
    first = _largest([_once(work, device) for _ in range(2)], device)[-1]
    wanted = max(effort.repeats, ceil(effort.seconds / first))
    wanted = min(wanted, max(3, ceil(effort.patience_s / first)), MOST_REPEATS)
    return _largest([_once(work, device) for _ in range(wanted)], device)


def _once(work: Work, device: torch.device) -> float:
    dist.barrier()
    if device.type != "cuda":
        before = perf_counter()
        work()
        return perf_counter() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _largest(own: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each number over all ranks."""
    values = torch.tensor(own, device=device, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [float(value) for value in values]


def _compare_all(rank: int, device: torch.device, say: Say, cases: Sequence[Case]) -> None:
    for case in cases:
        differences = _compared(case, rank, device)
        if rank == 0:
            say(differences)


def _compared(case: Case, rank: int, device: torch.device) -> dict[str, float]:
    fields, factory = case.fields, {"device": device, "dtype": torch.float64}
    ranks, size = fields["ranks"], (fields["tokens"], fields["hidden_size"])
    torch.manual_seed(0)
    grouped: Mapping[str, Any] = {**fields, "capacity_group_tokens": fields["tokens"]}
    single, whole = moe_layer(grouped, factory), moe_layer(fields, factory)
    whole.load_state_dict(single.state_dict())
    tokens, gradient = (torch.randn(ranks * size[0], size[1], **factory) for _ in range(2))
    tokens.requires_grad_()
    expected = single(tokens).y
    expected.backward(gradient)

    layer, mine = ExpertParallelLayer(whole, rank, ranks), slice(rank * size[0], (rank + 1) * size[0])
    x = tokens.detach()[mine].clone().requires_grad_()
    y = layer(x)
    y.backward(gradient[mine])
    held = slice(rank * layer.held, (rank + 1) * layer.held)
    pairs = {"output": (y, expected[mine]), "input gradient": (x.grad, tokens.grad[mine])}
    weights = dict(whole.named_parameters())
    for name, weight in single.named_parameters():
        own = weights[name].grad
        if name.startswith("experts."):
            pairs[f"{name} gradient"] = own, weight.grad[held]
        else:  # copies see the tokens of their own rank only
            dist.all_reduce(own)
            pairs[f"{name} gradient"] = own, weight.grad
    differences = [
        float(((ours - theirs).abs().max() / theirs.abs().max()).detach()) for ours, theirs in pairs.values()
    ]
    return dict(zip(pairs, _largest(differences, device), strict=True))


__all__ = ["ExpertParallelLayer", "agreement", "exchange", "timings"]
