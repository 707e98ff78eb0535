"""Which token goes to which expert, what overflows, and where it is computed.

The way of a load through the room::

    spec.routing.load      what the router does by itself          tendencies.py  (or a record: replay.py)
    spec.routing.balance   what balancing does to it over steps    remedies.py, evolution.py
    counts                 how many tokens choose each expert      load.py        (token by token: tokens.py)
    capacity               what overflows                          overflow.py, capacity.py  (by token: admission.py)
    placement              which rank computes it                  placement.py
    tokens                 which ranks one reaches, who loses all  together.py
    traffic                what travels                            traffic.py

:mod:`.drawing` walks this way for a scenario. Beside it stand the routers of the papers on logits (:mod:`.routers`),
the balancing losses (:mod:`.balance`) and the closed forms that check the sampled numbers (:mod:`.closed_forms`).
"""

from simulator.routing.drawing import expert_load, over_steps
from simulator.routing.expert_load import ExpertLoad
from simulator.routing.sizes import documents, group_tokens, tokens_per_rank

__all__ = ["ExpertLoad", "documents", "expert_load", "group_tokens", "over_steps", "tokens_per_rank"]
