"""Rows scattered over ranks and micro-batches -> second-order matrices on every rank, and gradients back.

The only storey that communicates, and the only place with the factor W.
"""

from scale_guide.statistics.matrices import Matrices
from scale_guide.statistics.plan import LAYOUTS, Layout, Node, Pair, Plan, Side, check_memory, make_plan
from scale_guide.statistics.statistics import MIN_ROWS, Rows, Statistics
from scale_guide.statistics.storage import Padding, Storage
from scale_guide.statistics.wires import Wires, count_bytes

__all__ = [
    "LAYOUTS",
    "MIN_ROWS",
    "Layout",
    "Matrices",
    "Node",
    "Padding",
    "Pair",
    "Plan",
    "Rows",
    "Side",
    "Statistics",
    "Storage",
    "Wires",
    "check_memory",
    "count_bytes",
    "make_plan",
]
