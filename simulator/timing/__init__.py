"""How long one op class takes alone on one profile."""

from simulator.timing.classes import Bulk, Compute, Exchange, Fixed, Item, OpClass, Region, Send, Update
from simulator.timing.prices import Pricer
from simulator.timing.table import Prices

__all__ = ["Bulk", "Compute", "Exchange", "Fixed", "Item", "OpClass", "Pricer", "Prices", "Region", "Send", "Update"]
