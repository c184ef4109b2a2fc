"""The planner: which sharding type every table gets, and which ranks hold its shards.

TorchRec's cost model with our enumeration (`options`), our search (`search`) and answers in numbers and words (`plan`).
Needs no process group, no GPU and no memory for weights: a plan is a function of tables, cluster and batch size, the
same in every process.
"""

from .options import Cost, Option
from .plan import DoesNotFit, Load, Planned, Reserved, make_plan

__all__ = ["Cost", "DoesNotFit", "Load", "Option", "Planned", "Reserved", "make_plan"]
