"""What can be timed: the pieces of a layer and of a training step, each a small mapping of sizes.

A case has a kind, its sizes, and a key that names both and finds it again in a file of records. Sizes n and k are
those of the forward linear [m, k] x [k, n]; which pass of it is timed says F (forward), I (gradient of the input) or W
(gradient of the weight). Bytes of memory-bound ops are those of the simulator's op list (:mod:`simulator.workload`).

A layer and a step also say of which pieces they consist, how often each. So a sum of measured pieces can be held
against the measured whole, without any fitted number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from simulator.routing import capacity
from simulator.spec.fields import ELEMENT_BYTES
from simulator.spec.model import Model
from simulator.workload import parameters

Implementation = Literal["batched", "grouped", "loop"]
LINEAR, OTHER = ("F", "I", "W"), ("F", "I")
_NO_PART_OF_THE_KEY = {"bytes", "pieces"}


@dataclass(frozen=True)
class Case:
    """One measurement: its kind, and its sizes as JSON values."""

    kind: str
    fields: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Kind, names, sizes; lists and mappings by their fingerprint.

        >>> gemm("F", "fp32", 512, 1024, 256).key
        'gemm/F/fp32/m=512,n=1024,k=256'
        """
        values = {name: value for name, value in self.fields.items() if name not in _NO_PART_OF_THE_KEY}
        names = [value for value in values.values() if isinstance(value, str)]
        sizes = [f"{name}={_shown(value)}" for name, value in values.items() if not isinstance(value, str)]
        return "/".join([self.kind, *names, *([",".join(sizes)] if sizes else [])])


Pieces = list[tuple[Case, int]]
"""Cases, and how often each occurs."""


@dataclass(frozen=True)
class Layer:
    """A MoE layer and its load: ``counts`` [experts] assignments before capacity, which sum to tokens x top_k.

    ``pad``: every expert computes all slots of its capacity, in one batched product. ``shared_experts`` are as wide as
    the routed ones. ``form`` is that of the experts, the router computes in fp32.
    """

    form: str
    tokens: int
    hidden_size: int
    expert_ffn_size: int
    experts: int
    top_k: int
    gated: bool
    shared_experts: int
    capacity_factor: float | None
    pad: bool
    implementation: Implementation
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(self.counts) != self.tokens * self.top_k or len(self.counts) != self.experts:
            raise ValueError("counts must be one for each expert and sum to tokens x top_k")
        if max(self.counts) > self.tokens:
            raise ValueError("no token chooses an expert twice: counts are at most tokens")
        if self.experts > self.hidden_size:
            raise ValueError("the load is put into the input, which needs hidden_size of at least experts")
        if self.pad != (self.implementation == "batched") or (self.pad and self.capacity_factor is None):
            raise ValueError("padded layers have a capacity and are computed batched, others are not")

    @property
    def slots(self) -> int | None:
        """Capacity of an expert; None = no limit."""
        if self.capacity_factor is None:
            return None
        return capacity.slots(self.capacity_factor, self.tokens, self.top_k, self.experts)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that each expert computes."""
        slots = self.slots
        if slots is None:
            return self.counts
        return tuple(slots if self.pad else min(count, slots) for count in self.counts)

    def case(self, which: Literal["F", "FB"]) -> Case:
        """The whole layer: forward, or forward and backward."""
        pieces = [[piece.key, count] for piece, count in self.pieces(which)]
        return Case("layer", {"which": which, **asdict(self), "counts": list(self.counts), "pieces": pieces})

    def pieces(self, which: Literal["F", "FB"]) -> Pieces:
        """Router, choice, plan, permute, experts, unpermute, shared experts, and where branches of the input meet."""
        found = list(self._pieces())
        return [(piece, count) for piece, count in found if which == "FB" or piece.fields["which"] == "F"]

    def _pieces(self) -> Iterator[tuple[Case, int]]:
        form, width, inner = self.form, self.hidden_size, self.expert_ffn_size * (2 if self.gated else 1)
        routing: dict[str, Any] = {"experts": self.experts, "top_k": self.top_k, "slots": self.slots, "pad": self.pad}
        routing["counts"] = list(self.counts)
        yield from ((gemm(which, "fp32", self.tokens, self.experts, width), 1) for which in LINEAR)
        for which in OTHER:
            yield memory("top_k", which, "fp32", self.tokens, self.experts, top_k=self.top_k), 1
            yield memory("permute", which, form, self.tokens, width, **routing), 1
            yield memory("unpermute", which, form, self.tokens, width, **routing), 1
            yield activation(which, form, sum(self.rows), self.expert_ffn_size, gated=self.gated), 1
        yield memory("plan", "F", form, self.tokens, self.top_k, **routing), 1
        for which in LINEAR:
            for n, k in ((inner, width), (width, self.expert_ffn_size)):
                yield grouped_gemm(which, form, n, k, self.rows, self.implementation), 1
        if self.shared_experts:
            shared = self.shared_experts * self.expert_ffn_size
            yield from feed_forward(form, self.tokens, width, shared, gated=self.gated)
            yield memory("residual", "F", form, self.tokens, width), 1
        yield memory("residual", "I", form, self.tokens, width), 2 if self.shared_experts else 1


def gemm(which: str, form: str, m: int, n: int, k: int) -> Case:
    """A dense linear with m rows."""
    return Case("gemm", {"which": which, "form": form, "m": m, "n": n, "k": k})


def grouped_gemm(which: str, form: str, n: int, k: int, counts: Iterable[int], implementation: str) -> Case:
    """The same linear in every expert, with the rows of each."""
    sizes = {"n": n, "k": k, "counts": list(counts)}
    return Case("grouped_gemm", {"which": which, "form": form, "implementation": implementation, **sizes})


def attention(which: str, form: str, heads: int, kv_heads: int, head_dim: int, tokens: int, **options: Any) -> Case:
    """An attention core, causal, of ``batch`` sequences (default 1); ``value_dim`` where values are narrower (MLA)."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "tokens": tokens}
    return Case("attention", {"which": which, "form": form, **sizes, "batch": 1, "causal": True, **options})


def memory(op: str, which: str, form: str, rows: int, width: int, **options: Any) -> Case:
    """A memory-bound op over rows of a width; ``bytes`` as in the op list, in I 1.5 times unless it gathers."""
    top_k = options.get("top_k", 1)
    elements = {
        "norm": 2.0 * width,
        "residual": 3.0 * width,
        "rope": 2.0 * width,
        "embedding": 2.0 * width,
        "cross_entropy": 3.0 * width,
        "activation": width * (3.0 if options.get("gated") else 2.0),
        "top_k": 2.0 * width,
        "permute": 2.0 * width * top_k,
        "unpermute": width * (top_k + 2.0),
        "plan": 4.0 * width,  # an index of 8 bytes for each choice, read and written
        "cast": 0.75 * width,  # bf16 read, fp8 written
        "adam": 7.0 * width,  # gradient; weight and two moments, read and written
    }[op]
    size = {"plan": 4.0, "cast": 4.0}.get(op, ELEMENT_BYTES[form])
    gathers = op in ("permute", "unpermute", "embedding")
    traffic = rows * elements * size * (1.5 if which == "I" and not gathers else 1.0)
    sizes = {"op": op, "which": which, "form": form, "rows": rows, "width": width, **options}
    return Case("memory", {**sizes, "bytes": traffic})


def activation(which: str, form: str, rows: int, width: int, *, gated: bool) -> Case:
    """The non-linearity of a feed-forward part of inner width ``width``."""
    return memory("activation", which, form, rows, width, gated=gated)


def feed_forward(form: str, rows: int, width: int, size: int, *, gated: bool) -> Iterator[tuple[Case, int]]:
    """Pieces of a dense feed-forward part."""
    for which in LINEAR:
        yield gemm(which, form, rows, size * (2 if gated else 1), width), 1
        yield gemm(which, form, rows, width, size), 1
    yield from ((activation(which, form, rows, size, gated=gated), 1) for which in OTHER)


def all_to_all(sent: Iterable[Iterable[int]], split: str, backend: str) -> Case:
    """One all-to-all: ``sent`` [i][j] bytes go from rank i to rank j."""
    matrix = [list(row) for row in sent]
    return Case("all_to_all", {"split": split, "backend": backend, "ranks": len(matrix), "sent": matrix})


def expert_parallel_layer(layer: Layer, ranks: int, which: Literal["F", "FB"], backend: str) -> Case:
    """A layer whose experts are divided over ``ranks``, each of which has tokens and counts as the layer says."""
    fields = {"which": which, "backend": backend, "ranks": ranks, **asdict(layer), "counts": list(layer.counts)}
    return Case("expert_parallel_layer", fields)


@dataclass(frozen=True)
class Step:
    """One training step of a small transformer with Adam on ``sequences`` sequences."""

    name: str
    form: str
    model: Mapping[str, Any]
    sequence_length: int
    sequences: int
    capacity_factor: float | None
    pad: bool
    implementation: Implementation

    def case(self) -> Case:
        """The step."""
        pieces = [[piece.key, count] for piece, count in self.pieces()]
        return Case("step", {"which": "step", **asdict(self), "model": dict(self.model), "pieces": pieces})

    def moe_layer(self) -> Layer:
        """Its MoE layer, under an even load."""
        model, tokens = Model.model_validate(self.model), self.sequence_length * self.sequences
        moe = model.moe
        assert moe is not None  # a law of the suites
        shape = self.form, tokens, model.hidden_size, moe.expert_ffn_size, moe.experts, moe.top_k, moe.gated
        capped = self.capacity_factor, self.pad, self.implementation
        return Layer(*shape, moe.shared_experts, *capped, spread(tokens, moe.top_k, [1.0] * moe.experts))

    def pieces(self) -> Pieces:
        """Everything that a step computes, each piece alone."""
        return list(self._pieces())

    def _pieces(self) -> Iterator[tuple[Case, int]]:
        model, form = Model.model_validate(self.model), self.form
        width, tokens, mixer = model.hidden_size, self.sequence_length * self.sequences, model.mixer
        heads, kv_heads, head_dim = mixer.heads or 1, mixer.key_value_heads, mixer.head_dim or 1
        kinds = [layer.ffn for layer in model.decoder_layers()]
        layers, sparse, dense = len(kinds), kinds.count("moe"), kinds.count("dense")
        for which in LINEAR:
            yield gemm(which, form, tokens, (heads + 2 * kv_heads) * head_dim, width), layers
            yield gemm(which, form, tokens, width, heads * head_dim), layers
            yield gemm(which, form, tokens, model.vocabulary_size, width), 1
        for which in OTHER:
            batch = {"batch": self.sequences}
            yield attention(which, form, heads, kv_heads, head_dim, self.sequence_length, **batch), layers
            yield memory("rope", which, form, tokens, (heads + kv_heads) * head_dim, head_dim=head_dim), layers
            yield memory("norm", which, form, tokens, width), 2 * layers + 1
            yield memory("residual", which, form, tokens, width), 2 * layers
            yield memory("embedding", which, form, tokens, width, vocabulary=model.vocabulary_size), 1
            yield memory("cross_entropy", which, form, tokens, model.vocabulary_size), 1
        if sparse:
            yield self.moe_layer().case("FB"), sparse
        if dense and model.ffn is not None:
            pieces = feed_forward(form, tokens, width, model.dense_ffn_size(), gated=model.ffn.gated)
            yield from ((piece, count * dense) for piece, count in pieces)
        yield memory("adam", "F", form, int(parameters.count(model).total.total), 1), 1


def spread(tokens: int, top_k: int, weights: Iterable[float]) -> tuple[int, ...]:
    """Assignments of each expert in proportion to ``weights``, none above ``tokens``, tokens x top_k in all.

    >>> spread(8, 2, [6.0, 1.0, 1.0])
    (8, 4, 4)
    """
    shares = np.array(list(weights), dtype=np.float64)
    full = np.zeros(len(shares), dtype=bool)
    while True:
        rest = tokens * (top_k - int(full.sum()))
        wanted = np.where(full, float(tokens), rest * shares / max(shares[~full].sum(), 1e-300))
        if (over := ~full & (wanted > tokens)).any():
            full |= over
            continue
        return tuple(int(count) for count in np.diff(np.floor(np.cumsum(wanted).round(6) + 0.5), prepend=0.0))


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
    return json.dumps(value)


__all__ = [
    "Case", "Implementation", "Layer", "Pieces", "Step", "activation", "all_to_all", "attention",
    "expert_parallel_layer", "feed_forward", "gemm", "grouped_gemm", "memory", "spread",
]  # fmt: skip
