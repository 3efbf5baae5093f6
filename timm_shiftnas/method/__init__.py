"""ShiftNAS."""
from .config import ShiftNASConfig
from .generator import ArchitectureGenerator, Rollout
from .groups import BudgetGroups
from .shift import ProbabilityShift
from .signals import ESTIMATORS, frozen, full_precision, gradient_norm, held_out_loss, hypergradient

__all__ = [
    'ArchitectureGenerator', 'BudgetGroups', 'ESTIMATORS', 'ProbabilityShift', 'Rollout', 'ShiftNASConfig', 'frozen',
    'full_precision', 'gradient_norm', 'held_out_loss', 'hypergradient',
]
