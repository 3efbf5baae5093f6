"""Which budgets training draws: groups of budgets, the learned distribution over them, and its signals."""
from .estimators import ESTIMATORS, frozen, hypergradient
from .groups import BudgetGroups
from .random import stream, stream_seed
from .shift import ProbabilityShift

__all__ = ['ESTIMATORS', 'BudgetGroups', 'ProbabilityShift', 'frozen', 'hypergradient', 'stream', 'stream_seed']
