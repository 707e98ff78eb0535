"""Which shapes are measured: random ones on a CPU core, those of published models on a GPU.

On a CPU, shapes of layers and attention are drawn at random with a fixed seed, as widely as a processor core can serve,
so that a fit can be judged on shapes that it has not seen. Training steps come in strides of 1, 2 and 4 and in capacity
factors of 1, 1.5 and 2, padded: the two design questions that a calibrated simulator must answer. On a GPU, shapes are
those of DeepSeek-V3 (arXiv 2412.19437), Mixtral 8x7B (2401.04088), DBRX and OpenMoE-8B (2402.01739), from 16 to 16384
tokens per expert.

A group holds a layer or model with its pieces, which are timed next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from simulator.spec.load import load_model
from validation.cases import (
    LINEAR,
    OTHER,
    Case,
    Implementation,
    Layer,
    Step,
    attention,
    gemm,
    grouped_gemm,
    memory,
    spread,
)

Group = list[Case]
MAX_FLOP, MAX_WEIGHT_BYTES = 10e9, 300e6

# --- one CPU core -----------------------------------------------------------------------------------------------------


def layers(number: int, seed: int, most_flop: float, *, form: str = "fp32") -> list[Group]:
    """Random layers with their pieces: of six, four are padded, one is dropless in a grouped product, one in a loop."""
    rng = np.random.default_rng(seed)
    found: list[Layer] = []
    while len(found) < number:
        implementation: Implementation = ("batched", "batched", "grouped", "batched", "loop", "batched")[len(found) % 6]
        layer = _random_layer(rng, form, implementation)
        weights = layer.experts * layer.hidden_size * layer.expert_ffn_size * (3 if layer.gated else 2) * 4
        if layer_flop(layer) <= most_flop and weights <= MAX_WEIGHT_BYTES:
            found.append(layer)
    return [layer_group(layer) for layer in found]


def layer_group(layer: Layer) -> Group:
    """A layer's pieces, then its forward alone and with its backward."""
    return [*(piece for piece, _ in layer.pieces("FB")), layer.case("F"), layer.case("FB")]


def layer_flop(layer: Layer) -> float:
    """FLOPs of a layer's forward."""
    matrices = (3 if layer.gated else 2) * layer.hidden_size * layer.expert_ffn_size
    rows = sum(layer.rows) + layer.tokens * layer.shared_experts
    return 2.0 * (matrices * rows + layer.tokens * layer.hidden_size * layer.experts)


def attentions(number: int, seed: int, most_tokens: int) -> list[Group]:
    """Random attention cores."""
    rng, groups = np.random.default_rng(seed), list[Group]()
    for _ in range(number):
        heads, share = int(rng.choice([2, 4, 8])), int(rng.choice([1, 2]))
        shape = heads, heads // share, int(rng.choice([32, 64, 128])), _between(rng, 256, most_tokens, 64)
        groups.append([attention(which, "fp32", *shape) for which in OTHER])
    return groups


MODELS: dict[str, tuple[int, int, int, int, int, int, int]] = {  # 2 to 50 million parameters in 4 layers
    # hidden size, heads, experts, top_k, expert_ffn_size, sequence length, sequences
    "a": (128, 4, 8, 2, 256, 256, 2),
    "b": (256, 4, 16, 2, 256, 256, 2),
    "c": (256, 4, 8, 1, 512, 512, 1),
    "d": (384, 6, 8, 2, 512, 256, 2),
    "e": (512, 8, 4, 2, 512, 512, 1),
    "f": (512, 8, 8, 1, 1024, 256, 3),
}


def steps(names: Sequence[str], strides: Sequence[int], factors: Sequence[float]) -> list[Group]:
    """Models with their pieces: every stride at the first capacity factor, every factor at the first stride."""
    groups = []
    for name in names:
        choices = {(stride, factors[0]): None for stride in strides} | {(strides[0], each): None for each in factors}
        group: Group = []
        for stride, factor in choices:
            step = small_step(name, stride, factor)
            group += step_group(step)
        groups.append(list({case.key: case for case in group}.values()))
    return groups


def step_group(step: Step) -> Group:
    """A step's pieces, its MoE layer with the layer's pieces, and the step."""
    return [*(piece for piece, _ in step.pieces()), *layer_group(step.moe_layer()), step.case()]


def small_step(name: str, stride: int, factor: float) -> Step:
    """One step of one of the small models."""
    width, heads, experts, top_k, size, length, sequences = MODELS[name]
    moe = {"experts": experts, "top_k": top_k, "expert_ffn_size": size, "stride": stride}
    model = {
        "name": f"small-{name}",
        "layers": 4,
        "hidden_size": width,
        "vocabulary_size": 4096,
        "context": length,
        "mixer": {"kind": "mha", "heads": heads, "head_dim": width // heads},
        "ffn": {"size": "match_active"},
        "moe": {**moe, "router": {"weights": "after_top_k"}},
    }
    return Step(f"small-{name}", "fp32", model, length, sequences, factor, True, "batched")


# --- one GPU ----------------------------------------------------------------------------------------------------------

# Preset, experts that one GPU holds.
GPU_MODELS = {"deepseek-v3": 8, "mixtral-8x7b": 8, "dbrx": 16, "openmoe-8b": 8}


def gpu_groups(scale: int = 1) -> list[Group]:
    """The suite of one GPU; ``scale`` divides every width and number of tokens, for a trial on a small device."""
    groups: list[Group] = []
    for name, held in GPU_MODELS.items():
        groups += [*_gpu_products(name, held, scale), _gpu_attention(name, scale), *_gpu_layers(name, held, scale)]
    return [*groups, *_gpu_steps(scale)]


def _gpu_products(name: str, held: int, scale: int) -> Iterator[Group]:
    """Expert linears, dense and grouped, at 16 to 16384 tokens per expert, even and skewed; casts to fp8."""
    model = load_model(name)
    moe = model.moe
    assert moe is not None  # a model of GPU_MODELS
    width, size = model.hidden_size // scale, moe.expert_ffn_size // scale
    shares = np.random.default_rng(held).exponential(size=held)
    for tokens in (16, 64, 256, 1024, 4096, 16384):
        rows, group = max(1, tokens // scale), list[Case]()
        for n, k in ((2 * size, width), (width, size)):
            for form in ("bf16", "fp8"):
                group += [gemm(which, form, max(16, rows), n, k) for which in LINEAR]
                passes = LINEAR if form == "bf16" else ("F",)  # PyTorch has the grouped product in fp8 forward only
                group += [grouped_gemm(which, form, n, k, [rows] * held, "grouped") for which in passes]
            skewed = spread(rows * held, 1, shares)
            group += [grouped_gemm(which, "bf16", n, k, skewed, "grouped") for which in LINEAR]
        group.append(memory("cast", "F", "fp8", rows, width))
        yield group


def _gpu_attention(name: str, scale: int) -> Group:
    """Attention cores; latent attention trains with keys and values expanded to every head."""
    mixer = load_model(name).mixer
    latent = mixer.kind == "mla"
    shape = mixer.heads or 1, (mixer.heads or 1) if latent else mixer.key_value_heads, mixer.qk_dim
    options = {"value_dim": mixer.value_dim} if latent else {}
    lengths = (1024, 4096, 8192)
    return [attention(which, "bf16", *shape, length // scale, **options) for length in lengths for which in OTHER]


def _gpu_layers(name: str, held: int, scale: int) -> Iterator[Group]:
    """Layers of the experts that one GPU holds: even and skewed load, dropless and padded, bf16 and fp8."""
    model = load_model(name)
    moe = model.moe
    assert moe is not None  # a model of GPU_MODELS
    tokens, top_k = 8192 // scale, min(moe.top_k, held // 2)
    even = spread(tokens, top_k, [1.0] * held)
    skewed = spread(tokens, top_k, np.random.default_rng(held).exponential(size=held))
    shared = min(moe.shared_experts, 1)
    size = model.hidden_size // scale, moe.expert_ffn_size // scale, held, top_k, moe.gated, shared
    for counts in (even, skewed):
        yield layer_group(Layer("bf16", tokens, *size, None, False, "grouped", counts))
        for factor in (1.0, 1.25, 1.5, 2.0):
            yield layer_group(Layer("bf16", tokens, *size, factor, True, "batched", counts))
        fp8 = Layer("fp8", tokens, *size, None, False, "loop", counts)
        yield [fp8.case("F"), fp8.case("FB")]


def _gpu_steps(scale: int) -> list[Group]:
    """A step of a transformer of half a billion parameters in three strides."""
    small, groups = small_step("f", 1, 1.0), []
    for stride in (1, 2, 4):
        model: dict[str, Any] = {
            **small.model,
            "name": "medium",
            "hidden_size": 1024 // scale,
            "context": 4096 // scale,
        }
        model["mixer"] = {"kind": "mha", "heads": 8, "head_dim": max(2, 128 // scale)}
        model["moe"] = {**model["moe"], "experts": 16, "top_k": 2, "expert_ffn_size": 2048 // scale, "stride": stride}
        model["vocabulary_size"] = 32000 // scale
        step = replace(small, name="medium", form="bf16", model=model, sequence_length=4096 // scale, sequences=4)
        groups.append(step_group(step))
    return groups


# --- layers that two ranks share --------------------------------------------------------------------------------------


def cpu_exchanged(number: int) -> list[Layer]:
    """Random layers whose experts two CPU processes share."""
    rng, found = np.random.default_rng(4), list[Layer]()
    while len(found) < number:
        layer = _random_layer(rng, "fp32", ("batched", "loop")[len(found) % 2])
        if layer_flop(layer) <= 2e9:
            found.append(layer)
    return found


def gpu_exchanged() -> list[Layer]:
    """Layers whose experts two GPUs share."""
    shapes = [(4096, 4096, 2048, 16, 4), (8192, 4096, 4096, 8, 2), (8192, 7168, 2048, 32, 8)]
    return [
        Layer("bf16", tokens, width, size, experts, top_k, True, 0, None, False, "grouped", counts)
        for tokens, width, size, experts, top_k in shapes
        for counts in (spread(tokens, top_k, [1.0] * experts),)
    ]


def _random_layer(rng: np.random.Generator, form: str, implementation: Implementation) -> Layer:
    tokens, width, size = _between(rng, 128, 4096, 64), _between(rng, 128, 1024, 32), _between(rng, 256, 2048, 32)
    experts, top_k = int(rng.choice([4, 8, 16, 32, 64])), int(rng.choice([1, 2, 4]))
    gated, shared, factor = bool(rng.random() < 0.7), int(rng.integers(2)), round(float(rng.uniform(0.5, 2.0)), 2)
    pad = implementation == "batched"
    counts = spread(tokens, min(top_k, experts), rng.dirichlet([5.0] * experts))
    shape = form, tokens, width, size, experts, min(top_k, experts), gated, shared
    return Layer(*shape, factor if pad else None, pad, implementation, counts)


def _between(rng: np.random.Generator, low: int, high: int, multiple: int) -> int:
    """A multiple of a number, of evenly distributed logarithm."""
    return max(low, round(float(np.exp(rng.uniform(np.log(low), np.log(high)))) / multiple) * multiple)


__all__ = [
    "GPU_MODELS", "MAX_FLOP", "MODELS", "Group", "attentions", "cpu_exchanged", "gpu_exchanged", "gpu_groups",
    "layer_flop", "layers", "small_step", "steps",
]  # fmt: skip
