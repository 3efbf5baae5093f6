"""ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300) in three formulas.

Supernet weights w; arch A with C(A) MACs; budget b; A_k the arch that the generator proposes for the upper edge of
budget group k = 1..K. The page `docs/method.md` explains them.

1. **Matrix mapping** (section 3.3; `space/matrix_mapping.py`). One-hot choices become nested masks, so that the loss of
   a masked supernet has a gradient for the choices: `mask = one_hot @ M`, with `M[i, j] = 1 if j < width_i else 0`.

2. **Generator loss** (section 3.3; `generator.py`):
   `L = L_task(w, masks(A)) + lambda * mean(((C(A) - b) / (C_max - C_min))**2)`.

3. **Probability shift** (section 3.2; `signals.py`, `shift.py`). Training draws group k with probability
   `P_k = (1 - f) * softmax(theta)_k + f / K`. A signal s gives theta:

   * hypergradient: `s_k = <g, grad L_train(w; A_k)>`, `g = 1/K * sum_j grad L_val(w; A_j)`, and
     `theta_k <- theta_k + lr * (clamp((s_k - sum_j P_j s_j) / sigma, -3, 3) - theta_k)`;
   * grad_norm: `s_k = |grad L_val(w; A_k)| / sqrt(n_k)`, and `softmax(theta)` proportional to the average of s;
   * variation: `s_k = |L_val,k - L'_val,k| / L_val,k` since the last shift, and theta likewise.
"""
from .config import RunConfig, Setting, ShiftNASConfig, find_conflict, settings_of
from .generator import ArchitectureGenerator, Rollout, generator_loss, resource_loss
from .groups import BudgetGroups
from .shift import ProbabilityShift, group_probabilities, proportional_theta, shift_step
from .signals import (
    Signal,
    create_signal,
    frozen,
    full_precision,
    grad_norm,
    held_out_losses,
    hypergradient,
    variation,
)

__all__ = [
    'ArchitectureGenerator', 'BudgetGroups', 'ProbabilityShift', 'Rollout', 'RunConfig', 'Setting', 'ShiftNASConfig',
    'Signal', 'create_signal', 'find_conflict', 'frozen', 'full_precision', 'generator_loss', 'grad_norm',
    'group_probabilities', 'held_out_losses', 'hypergradient', 'proportional_theta', 'resource_loss', 'settings_of',
    'shift_step', 'variation',
]
