"""What every number of an estimate means: meaning, formula, source. ``moesim explain`` opens a number with it."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """Meaning of one key or term."""

    meaning: str
    formula: str
    source: str = ""


KEYS: dict[str, Meaning] = {
    "gpu_hours": Meaning(
        "Accelerator-hours of all phases of the training.",
        "accelerators x seconds / 3600; seconds = tokens / (batch x sequence) x step",
    ),
    "days": Meaning("Duration of the training.", "seconds / 86400"),
    "cost_usd": Meaning("What the accelerator-hours cost.", "gpu_hours x price_per_accelerator_hour"),
    "step_time_s": Meaning(
        "Duration of one optimizer step at the steady batch: the makespan of its Program.", "max over ops of their end"
    ),
    "step_breakdown_s": Meaning(
        "Where a step goes: mean over ranks; on every rank the terms sum to the step.",
        "kernels by family + gaps by reason",
    ),
    "bubble_s": Meaning(
        "Time in which a rank has nothing to do because other stages work (makespan notion, mean over ranks).",
        "step - kernels - exposed communication - waiting",
        "arXiv 2401.10241 distinguishes it from the span notion",
    ),
    "exposed_communication_s": Meaning(
        "Communication that no compute hides, mean over ranks.", "sum of the exposed_* terms"
    ),
    "tokens_per_s_per_accelerator": Meaning("Throughput of one chip.", "batch x sequence / step / accelerators"),
    "model_flop_per_token": Meaning(
        "Training FLOPs of one token, causal: lower triangle of attention, LM head in, router and MTP out.",
        "3 x (2 x matrix parameters met + 2 heads (d_qk + d_v) s/2 per layer)",
        "convention of arXiv 2505.09343, Table 4",
    ),
    "model_flop_per_token_noncausal": Meaning(
        "The same with the whole attention matrix.", "s instead of s/2", "arXiv 2505.09343"
    ),
    "mfu": Meaning(
        "Model FLOPs utilisation, causal; dropped assignments count as done.",
        "model_flop_per_token x tokens_per_s_per_accelerator / mfu_peak_flop_per_s",
    ),
    "mfu_noncausal": Meaning("Model FLOPs utilisation, non-causal.", "as mfu with model_flop_per_token_noncausal"),
    "mfu_peak_flop_per_s": Meaning("Dense BF16 peak of one chip, whatever format is used.", "datasheet"),
    "hfu": Meaning(
        "Hardware FLOPs utilisation: what is computed, with router, MTP, recomputation, padding, without drops.",
        "hardware FLOPs / peak",
    ),
    "parameters_total": Meaning(
        "Every weight of the text model, embedding and head once when tied, MTP apart.", "sum over the op list"
    ),
    "parameters_active": Meaning(
        "Weights that one token uses, table and head counted in full.", "total - unused routed experts"
    ),
    "memory_peak_bytes": Meaning(
        "Allocated bytes of the worst rank at the worst moment of the schedule.", "sum of memory_breakdown_bytes"
    ),
    "memory_breakdown_bytes": Meaning(
        "States under ZeRO, saved tensors times microbatches in flight, buffers.",
        "moesim explain SCENARIO saved_expert and so on",
        "arXiv 1910.02054, 2205.05198",
    ),
    "fits": Meaning("Whether the peak stays below the usable share of the memory.", "peak <= memory x usable_fraction"),
    "dropped_token_fraction": Meaning(
        "Expert assignments over capacity, of all assignments.", "1 - processed / assigned", "arXiv 2101.03961"
    ),
    "dropped_token_fraction_by_position": Meaning(
        "Dropped share of the assignments in each tenth of a capacity group. In order of arrival an expert takes what "
        "comes until it is full, so that the last tokens lose most; by score or at random all tenths are alike.",
        "dropped / assigned, by tenth of the group",
        "drop-towards-the-end: OpenMoE, arXiv 2402.01739",
    ),
    "lost_token_fraction": Meaning(
        "Tokens that lose all their experts and pass by the residual path alone.",
        "share of tokens for which all top_k experts are full, from blocks of tokens routed one by one",
        "arXiv 2101.03961; drop-towards-the-end: arXiv 2402.01739",
    ),
    "padding_fraction": Meaning("Computed expert rows that hold no token.", "1 - processed / computed"),
    "expert_load_max_over_mean": Meaning(
        "Most loaded expert over the mean, averaged over layers and microbatches.",
        "MaxVio + 1",
        "MaxVio: arXiv 2408.15664",
    ),
    "expert_rank_load_max_over_mean": Meaning(
        "Rows that the busiest expert-parallel rank computes over the mean of the assigned ones; all layers and "
        "microbatches averaged. It sets the pace of the expert exchange and of the experts.",
        "max over ranks of computed rows x ranks / assigned",
    ),
    "all_to_all_bytes_per_token": Meaning(
        "Bytes that one token's expert exchanges put on the network in a step, all MoE layers, forward and backward.",
        "2 x (dispatch + combine bytes) x hidden x copies, by tier",
        "one copy per node, forwarded inside: arXiv 2412.19437, section 3.2.2",
    ),
}

TERMS: dict[str, Meaning] = {
    "attention": Meaning("Projections around attention.", "GEMM curve of the profile"),
    "attention_core": Meaning("Scores, softmax, weighted sum.", "causal FLOPs / (r s / (s + s_half)); backward 2.5 x"),
    "expert": Meaning(
        "Routed experts: grouped products and activation.", "grouped GEMM curve on the counts of each expert"
    ),
    "shared_expert": Meaning("Shared experts.", "GEMM curve"),
    "dense_ffn": Meaning("Dense feed-forward parts.", "GEMM curve"),
    "router": Meaning("Router logits and top-k.", "GEMM curve in the router's format, memory curve"),
    "permute": Meaning(
        "Tokens sorted by expert and back, or products with one-hot masks.",
        "memory curve, permute fraction; GEMM curve",
    ),
    "norm": Meaning("Norms.", "memory curve"),
    "cast": Meaning(
        "Operands of FP8 products cast with their scales: inputs and gradients by rows, for the weights by columns.",
        "quantize_passes of the profile x bytes moved, 3 to 4 an element (arXiv 2412.19437, section 3.3.2)",
    ),
    "elementwise": Meaning("Residuals, rotary positions.", "memory curve"),
    "embedding": Meaning("Table look-up.", "memory curve"),
    "lm_head": Meaning("Output head and loss.", "GEMM and memory curves"),
    "mtp": Meaning("Multi-token-prediction module with its head.", "as its ops"),
    "recompute": Meaning("Forward ops computed again in the backward pass.", "as their forward"),
    "optimizer": Meaning(
        "Optimizer update of the rank's shard.", "bytes of gradient, states (twice) and weights / memory bandwidth"
    ),
    "stack": Meaning(
        "Idle time between kernels that the software stack adds.",
        "gap_fraction x kernels (+ step overhead)",
        "profile: stacks",
    ),
    "exposed_expert_all_to_all": Meaning(
        "Dispatch and combine that no compute hides.", "gaps in which the rank waits for the transfer"
    ),
    "exposed_tensor": Meaning("Tensor-parallel collectives.", "they block the compute stream"),
    "exposed_context": Meaning("Context-parallel ring.", "it blocks the compute stream"),
    "exposed_pipeline": Meaning("Messages between stages that no compute hides.", "bytes / link + latency"),
    "exposed_gradient_reduce": Meaning("Gradient reduction that no compute hides.", "reduce-scatter or all-reduce"),
    "exposed_parameter_gather": Meaning("Parameter gathers that no compute hides.", "all-gather"),
    "waiting": Meaning(
        "Waiting for slower members of a collective: the price of skew.", "start of the collective - own arrival"
    ),
    "waiting_replicas": Meaning(
        "Waiting at the end of the step for the slowest of the expert groups that share a stage, where kernels jitter.",
        "z(replicas) x jitter x sqrt(sum of squared kernel times)",
        "expected largest of independent normal numbers",
    ),
    "bubble": Meaning("Nothing to do because other stages work.", "what is left of the gaps"),
}


MEMORY: dict[str, Meaning] = {
    "weights": Meaning("Resident weights.", "parameters x bytes of precision.weights, sharded by ZeRO 3"),
    "gradients": Meaning(
        "Accumulated gradients.", "parameters x bytes of optimizer.gradients, sharded by ZeRO 2 and 3"
    ),
    "optimizer": Meaning("Master weights and moments.", "parameters x their bytes, sharded by ZeRO 1 to 3"),
    "saved": Meaning(
        "Tensors of this family kept for the backward pass.",
        "bytes per microbatch x microbatches in flight",
        "arXiv 2205.05198",
    ),
    "exchange_buffers": Meaning(
        "Tokens of expert exchanges held at once: what goes into one and comes out of it; under transformer_engine, "
        "those of both exchanges until the MoE layer ends.",
        "(sent + received) x width x bytes; transformer_engine: (sent + 3 received) + output of the shared experts, or "
        "2 sent + received with one expert on a rank",
        "Megatron-LM @ 23e00ed, MoELayer.forward",
    ),
    "logits": Meaning(
        "Logits of one microbatch, or the gradient that takes their place.",
        "vocabulary x tokens x 4 / tensor; transformer_engine: bytes of precision.lm_head instead of 4",
        "Megatron-LM @ 23e00ed, CrossEntropyFunction",
    ),
    "activation_gradients": Meaning(
        "Gradients beside the saved tensors when a backward pass begins: that of the head's input (with the gathered "
        "input under sequence parallelism), or those of a dense feed-forward part.",
        "head: tokens x hidden x bytes x (2 under sequence parallelism); dense: tokens x (hidden + inner / tensor) x "
        "bytes, hidden / tensor under sequence parallelism",
    ),
    "weight_gradients": Meaning(
        "Gradients of weights on their way into the accumulated ones: that of one weight at a time; under "
        "transformer_engine, which adds them inside the product, an empty tensor kept for each shape of weight.",
        "largest weight x bytes of precision.weights; transformer_engine: sum over the different shapes",
        "Transformer Engine 2.11, get_dummy_wgrad",
    ),
    "gathered_weights": Meaning("Layers gathered at a time under ZeRO 3.", "(prefetch + 1) x largest block"),
    "recomputed_layer": Meaning(
        "What the backward pass of one layer brings back.", "all its saved tensors - those kept"
    ),
}


_BUFFERS = (
    "exchange_buffers",
    "logits",
    "activation_gradients",
    "weight_gradients",
    "gathered_weights",
    "recomputed_layer",
)
"""Terms of the memory that are known by their whole name, not by its first word."""


def known_terms() -> dict[str, Meaning]:
    """Every key and term that can be explained, except the families of the memory ledger."""
    return {
        **KEYS,
        **TERMS,
        **{name: MEMORY[name] for name in _BUFFERS},
    }


def meaning_of(name: str) -> Meaning | None:
    """Meaning of a key, of a term of the step, or of a term of the memory (saved_expert, weights_dense, ...)."""
    return known_terms().get(name) or MEMORY.get(name.split("_")[0])
