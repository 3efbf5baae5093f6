"""ShiftNAS."""
from .config import RunConfig, Setting, ShiftNASConfig, find_conflict, settings_of
from .generator import ArchitectureGenerator, Rollout
from .groups import BudgetGroups
from .shift import ProbabilityShift
from .signals import ESTIMATORS, frozen, full_precision, gradient_norm, held_out_loss, hypergradient

__all__ = [
    'ArchitectureGenerator', 'BudgetGroups', 'ESTIMATORS', 'ProbabilityShift', 'Rollout', 'RunConfig', 'Setting',
    'ShiftNASConfig', 'find_conflict', 'frozen', 'full_precision', 'gradient_norm', 'held_out_loss', 'hypergradient',
    'settings_of',
]
