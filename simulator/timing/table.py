"""The table of prices: seconds of every class alone on the profile, and what its communication puts on each link."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from simulator.timing.kernels import FloatArray


@dataclass(frozen=True)
class Prices:
    """Prices of a list of classes.

    ``row[c]`` and ``rows[c]``: first row and number of rows of class c. ``seconds`` [rows, lanes]; ``latency`` [rows];
    ``flow_seconds`` and ``flow_demand`` [rows, tiers]; ``share`` [classes, families]: how a compute class divides
    among families. ``noise`` [ops, lanes], for one Program only: factor on the seconds of every op, where kernel times
    vary between ranks.
    """

    row: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    seconds: FloatArray
    latency: FloatArray
    flow_seconds: FloatArray
    flow_demand: FloatArray
    share: FloatArray
    families: tuple[str, ...]
    noise: FloatArray | None = None

    @property
    def lanes(self) -> int:
        """Ranks of an expert group that are told apart."""
        return int(self.seconds.shape[1])

    def slowest(self) -> Prices:
        """One rank per group: every op takes as long as in its slowest lane, an upper bound on the step."""
        noise = None if self.noise is None else self.noise.max(axis=1, keepdims=True)
        return replace(self, seconds=self.seconds.max(axis=1, keepdims=True), noise=noise)
