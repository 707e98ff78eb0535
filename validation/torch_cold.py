"""What a piece does not find in a cache when it runs inside of a training step.

Between two uses of a weight lie all other layers, and an output goes to memory that nothing has touched lately, since
the forward keeps it for the backward pass and a gradient stays until the optimizer reads it. A loop over one piece
would find both in the last cache, several times faster. So in a timing loop

    weights   are views of one pool larger than that cache, taken in turn; of whole layers, copies take turns,
    outputs   are kept until as many bytes were written, so that the allocator gives other memory.

The other inputs of a piece were written by the piece before it and are used again and again, and so is the code.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Whole = TypeVar("Whole")
Work = Callable[[], object]
COLD_BYTES = {"cpu": 160e6, "cuda": 128e6}
"""More than what one core can hold of a last cache, and more than the last cache of a GPU."""
MOST_TURNS = 64
ALIGNED = 64
"""Elements to whose multiples the weights in the pool are aligned."""


def cold_weights(size: tuple[int, ...], factory: Any) -> list[Tensor]:
    """Weights of a size that take turns: all out of the cache by the time the first is used again."""
    count = math.prod(size)
    pool = _pool(factory["device"], factory["dtype"])
    each = math.ceil(count / ALIGNED) * ALIGNED
    number = min(_turns(count * pool.element_size(), factory["device"]), pool.numel() // each)
    if number < 2:  # it does not fit into a cache itself
        return [torch.randn(size, **factory)]
    return [pool[index * each : index * each + count].view(size) for index in range(number)]


def cold_copies(whole: Whole, parameters: Iterable[Tensor]) -> list[Whole]:
    """A layer and copies of it, which take turns as weights do."""
    held = list(parameters)
    number = _turns(sum(each.numel() * each.element_size() for each in held), held[0].device)
    return [whole, *(copy.deepcopy(whole) for _ in range(number - 1))]


def in_turn(works: list[Work]) -> Work:
    """One after another, and again."""
    turns = itertools.cycle(works)

    def run() -> object:
        return next(turns)()

    return run


def with_fresh_outputs(work: Work, device: torch.device) -> Work:
    """The same, with earlier outputs kept; it is run until memory for all of them has been allocated."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(work()))
    kept = deque[object](maxlen=_turns(size, device) if size else 1)

    def run() -> object:
        output = work()
        kept.append(output)
        return output

    for _ in range((kept.maxlen or 0) + 1 if size * MOST_TURNS > COLD_BYTES.get(device.type, 0.0) / 8 else 0):
        run()
    return run


def _turns(size_bytes: float, device: torch.device) -> int:
    return min(max(math.ceil(COLD_BYTES.get(device.type, 0.0) / size_bytes), 1), MOST_TURNS)


@cache
def _pool(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(int(COLD_BYTES.get(device.type, 0.0)) // dtype.itemsize, device=device, dtype=dtype)


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)


__all__ = ["COLD_BYTES", "Work", "cold_copies", "cold_weights", "in_turn", "with_fresh_outputs"]
