"""The architecture generator (AG) of ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300): from a budget to an arch.

An LSTM decides the choices of a search space one after the other, each knowing the budget and the decisions before it.
Decisions are hard; gradients pass through the softmax behind them (straight-through Gumbel-softmax, Jang et al.,
ICLR 2017, arXiv 1611.01144), so the generator learns from any function of its one-hots: their MACs, or a task loss.

A budget is an upper bound on MACs (multiply-accumulates per image at batch 1).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ..space import complexity
from ..space.core import Arch, SearchSpace
from ..utils.units import format_count, parse_count

__all__ = ['ArchitectureGenerator', 'Rollout']


class Rollout(NamedTuple):
    """Archs drawn for B budgets: one decision for each of n choices, those of layers beyond the depth included."""
    one_hots: tuple[Tensor, ...]  # per choice [B, number of values], exactly 0 and 1, with straight-through gradients
    indices: Tensor  # [B, n], int64
    log_prob: Tensor  # [B]: of the active choices, under the logits without noise


class ArchitectureGenerator(nn.Module):
    """LSTM that maps budgets to archs of one search space.

    It stays on the CPU in float32, whatever `.to(...)` it gets as a part of something larger: it is tiny, and each
    of its decisions would cost a GPU synchronisation. It draws from nothing but the `torch.Generator`s given to it.

    Args:
        space: A bound search space (the `space` of a model).
        hidden_size: Width of the LSTM.
        seed: Of the initial weights; the global random state is neither read nor written.

    Raises:
        ValueError: If the space is not bound.
    """

    def __init__(self, space: SearchSpace, hidden_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.space = space
        self.hidden_size = hidden_size
        self.macs_min, self.macs_max = complexity.macs_range(space)

        counts = [len(choice.values) for choice in space.choices]
        steps, most = len(counts), max(counts)
        # Heads are padded to the largest number of values, so that all of them are slices of one tensor.
        self._is_padding = torch.tensor([[value >= count for value in range(most)] for count in counts], device='cpu')
        # Choice i exists where _exists[i, index of choice _gates[i]] holds.
        gates = [i if choice.gate is None else choice.gate for i, choice in enumerate(space.choices)]
        self._gates = torch.tensor(gates, device='cpu')
        self._exists = torch.ones(steps, most, dtype=torch.bool, device='cpu')
        for i, choice in enumerate(space.choices):
            if choice.gate is not None:
                depths = space.choices[choice.gate].values
                self._exists[i, :len(depths)] = torch.tensor(
                    [depth >= choice.min_depth for depth in depths], device='cpu')

        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            data = torch.empty(shape, dtype=torch.float32, device='cpu')
            return nn.Parameter(data.uniform_(-1, 1, generator=generator) / math.sqrt(hidden_size))

        self.budget_weight = parameter(2, 4 * hidden_size)
        self.step_weight = parameter(most + hidden_size, 4 * hidden_size)  # reads the previous decision and the state
        self.bias = parameter(4 * hidden_size)  # of the input, forget and output gates and the cell's candidate
        self.head_weight = parameter(steps, hidden_size, most)
        self.head_bias = parameter(steps, most)

    def _apply(self, fn: Callable, recurse: bool = True) -> ArchitectureGenerator:
        return self  # no moves, no casts: see the class

    # -- drawing archs -------------------------------------------------------------------------------------------------

    def forward(self, budgets: Tensor, *, noise: torch.Generator | None = None, tau: float = 1.0) -> Rollout:
        """Decide all choices, one arch for each budget.

        Args:
            budgets: MACs, [B]; those out of the space's range count as its nearer end.
            noise: Draws the Gumbel noise that makes the decisions a sample; `None` takes the likeliest value each time.
            tau: Temperature of the softmax that gradients pass through; it changes no decision.

        Raises:
            ValueError: If `budgets` is not one-dimensional or `tau` is not positive.
        """
        if not tau > 0:
            raise ValueError(f'tau={tau!r} must be positive, such as 1.0')
        budgets = _as_budgets(budgets)
        return self._roll(budgets, None if noise is None else self._gumbel(len(budgets), noise), tau, torch.float32)

    def _roll(self, budgets: Tensor, gumbel: Tensor | None, tau: float, dtype: torch.dtype) -> Rollout:
        """`forward` with its noise, [B, n, most values], and the precision to compute in."""
        batch, hidden_size = len(budgets), self.hidden_size
        with torch.autocast('cpu', enabled=False):
            step_weight, heads = self.step_weight.to(dtype), self.head_weight.to(dtype).unbind(0)
            head_biases = self.head_bias.to(dtype).masked_fill(self._is_padding, -math.inf).unbind(0)
            noises = [0.] * len(heads) if gumbel is None else gumbel.to(dtype).unbind(1)
            positions = self._positions(budgets).to(dtype)
            from_budget = torch.addmm(self.bias.to(dtype), positions, self.budget_weight.to(dtype))

            previous = from_budget.new_zeros(batch, self._exists.shape[1])
            hidden = cell = from_budget.new_zeros(batch, hidden_size)
            all_logits, indices, one_hots = [], [], []
            for head, head_bias, noise in zip(heads, head_biases, noises):
                gates = torch.addmm(from_budget, torch.cat((previous, hidden), 1), step_weight)
                enter, forget, leave = gates[:, :3 * hidden_size].sigmoid().chunk(3, 1)
                cell = forget * cell + enter * gates[:, 3 * hidden_size:].tanh()
                hidden = leave * cell.tanh()
                logits = torch.addmm(head_bias, hidden, head)
                noisy = logits + noise
                index = noisy.argmax(-1, keepdim=True)
                previous = torch.zeros_like(logits).scatter_(1, index, 1.)
                if noisy.requires_grad:
                    soft = (noisy / tau).softmax(-1)
                    previous = previous + (soft - soft.detach())  # the bracket is exactly 0: the values stay hard
                all_logits.append(logits)
                indices.append(index)
                one_hots.append(previous)

            indices = torch.cat(indices, 1)
            log_probs = torch.stack(all_logits, 1).log_softmax(-1).gather(-1, indices[..., None])[..., 0]
        return Rollout(
            one_hots=tuple(one_hot[:, :len(choice.values)] for one_hot, choice in zip(one_hots, self.space.choices)),
            indices=indices,
            log_prob=(log_probs * self._active(indices)).sum(-1))

    def _positions(self, budgets: Tensor) -> Tensor:
        """Normalised budgets, [B, 2]: where they lie in the range of MACs, and in that of their logarithm, as -1 to 1.

        The logarithm tells the smallest budgets apart, which a wide range crowds into a sliver of the first.
        """
        budgets = budgets.clamp(self.macs_min, self.macs_max)
        linear = (budgets - self.macs_min) / self._span
        logarithmic = (budgets / self.macs_min).log() / (math.log(self.macs_max / self.macs_min) or 1.)
        return torch.stack((linear, logarithmic), dim=-1) * 2 - 1

    @property
    def _span(self) -> int:
        return self.macs_max - self.macs_min or 1  # a space may hold a single arch

    def _gumbel(self, rows: int, noise: torch.Generator) -> Tensor:
        """Gumbel noise, [rows, n, most values], in float64, where the logarithms do not meet a 0."""
        uniform = torch.rand(rows, *self._exists.shape, generator=noise, dtype=torch.float64, device='cpu')
        return -(-uniform.log()).log()

    def _active(self, indices: Tensor) -> Tensor:
        """Which choices exist at the depths that were chosen: bool, shaped as `indices`, [..., n]."""
        return self._exists[torch.arange(len(self._gates), device='cpu'), indices[..., self._gates]]

    @torch.no_grad()
    def sample(self, budgets: Tensor, noise: torch.Generator) -> list[Arch]:
        """Draw an arch for each of the budgets (MACs, [B]); a sample lies near its budget, above it or below.

        Raises:
            ValueError: If `noise` is not a `torch.Generator` or `budgets` is not one-dimensional.
        """
        if not isinstance(noise, torch.Generator):
            raise ValueError(f'sample needs a torch.Generator, got {noise!r}; try torch.Generator().manual_seed(0)')
        return [self.space.decode(indices) for indices in self(budgets, noise=noise).indices.tolist()]

    # -- learning the resource constraint ------------------------------------------------------------------------------

    def resource_loss(self, budgets: Tensor, one_hots: Sequence[Tensor]) -> Tensor:
        """Mean over the batch of `((C - b) / (C_max - C_min))**2`, C the exact MACs of the one-hots.

        Args:
            budgets: b, in MACs, [B].
            one_hots: Per choice [B, number of values], as in a `Rollout`.

        Returns:
            A differentiable float64 scalar.
        """
        error = (complexity.macs(self.space, one_hots) - _as_budgets(budgets)) / self._span
        return error.square().mean()

    @torch.enable_grad()
    def fit(
            self,
            steps: int = 1000,
            batch_size: int = 64,
            lr: float = 3e-3,
            weight: float = 1000.0,
            seed: int = 0,
            progress: bool = True,
    ) -> ArchitectureGenerator:
        """Learn to meet budgets, by the resource term alone: no images, seconds on one core.

        Adam; the learning rate falls to 0 and the temperature from 1 to 0.3, both linearly.

        Args:
            steps: Number of updates.
            batch_size: Budgets per update, over the whole range with both ends among them.
            lr: Initial learning rate.
            weight: Factor of the resource loss (the lambda of the paper).
            seed: Of the budgets and the noise.
            progress: Show a bar, with rate and time left, where the standard error stream is a terminal.

        Raises:
            ValueError: If `batch_size` leaves no room for both ends of the range.
        """
        if batch_size < 2:
            raise ValueError(f'batch_size={batch_size!r} must be 2 or more: both ends of the range are in every batch')
        noise = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr)
        bar = tqdm(range(steps), desc='fitting the generator', unit='step', disable=None if progress else True)
        for step in bar:
            done = step / steps
            budgets = self._fit_budgets(batch_size, noise)
            loss = weight * self.resource_loss(budgets, self(budgets, noise=noise, tau=1 - 0.7 * done).one_hots)
            optimizer.zero_grad()
            loss.backward()
            # Straight-through gradients have rare large outliers, each of which would undo many steps.
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.param_groups[0]['lr'] = lr * (1 - done)
            optimizer.step()
        optimizer.zero_grad()
        return self

    def _fit_budgets(self, count: int, noise: torch.Generator) -> Tensor:
        """Budgets of one update, [count]: spread evenly over the range of MACs and, every other, of their logarithm.

        The ends are the hardest to learn, for there only one arch is right: 5% more on either side collapses onto each.
        """
        parts = torch.arange(count, dtype=torch.float64, device='cpu')
        share = (parts + torch.rand(count, generator=noise, dtype=torch.float64, device='cpu')) / count
        share = (share * 1.1 - 0.05).clamp(0, 1)
        share[0], share[-1] = 0, 1
        linear = self.macs_min + share * (self.macs_max - self.macs_min)
        logarithmic = self.macs_min * (self.macs_max / self.macs_min) ** share
        return torch.where(parts % 2 == 0, linear, logarithmic)

    # -- an arch for a budget ------------------------------------------------------------------------------------------

    def propose(self, flops: float | str) -> Arch:
        """The arch for a budget: never above it, and always the same as long as the weights are.

        Of the likeliest arch and a fixed set of samples, the one of highest probability that uses at least 99% of the
        budget. Where none does, the largest ones below it are enlarged by single choices as far as the budget goes.

        Args:
            flops: Budget in MACs: a number, or a string such as '1.4G'. Up to 1% above the largest arch is accepted.

        Raises:
            ValueError: If the budget is out of the space's range, or is no number.
        """
        return self.propose_many([flops])[0]

    @torch.no_grad()
    def propose_many(self, budgets: Sequence[float | str]) -> list[Arch]:
        """`propose` for several budgets at once, with the same result and errors as one by one."""
        limits = [self._check_budget(budget) for budget in budgets]
        # One row without noise, which is the argmax, and 64 samples. In float64, so that rounding, which depends on the
        # machine and on the size of the batch, does not turn decisions.
        gumbel = self._gumbel(64, torch.Generator().manual_seed(0))
        gumbel = torch.cat((torch.zeros_like(gumbel[:1]), gumbel))
        archs = []
        for start in range(0, len(limits), 16):  # larger batches leave the cache
            part = torch.tensor(limits[start:start + 16], dtype=torch.float64, device='cpu')
            rollout = self._roll(
                part.repeat_interleave(len(gumbel)), gumbel.repeat(len(part), 1, 1), tau=1.0, dtype=torch.float64)
            indices = (rollout.indices * self._active(rollout.indices)).unflatten(0, (len(part), len(gumbel)))
            log_prob = rollout.log_prob.view(len(part), len(gumbel))
            macs = self._macs(indices)
            for i, limit in enumerate(part):
                archs.append(self.space.decode(self._select(limit, indices[i], macs[i], log_prob[i]).tolist()))
        return archs

    def _select(self, limit: Tensor, indices: Tensor, macs: Tensor, log_prob: Tensor) -> Tensor:
        """The candidate that `propose` describes, [n], out of [candidates, n] with their MACs and probabilities."""
        close = (macs >= 0.99 * limit) & (macs <= limit)
        if close.any():
            return indices[log_prob.masked_fill(~close, -math.inf).argmax()]
        smallest = torch.zeros_like(indices[:1])
        fitting = torch.cat((smallest, indices[macs <= limit])).unique(dim=0)
        return self._enlarge(limit, fitting[self._macs(fitting).argsort(descending=True, stable=True)[:8]])

    def _enlarge(self, limit: Tensor, indices: Tensor) -> Tensor:
        """Best end, [n], of climbing from each of the archs, [starts, n], by the single changes that bring MACs highest
        within `limit`, until none helps."""
        choices, values = torch.nonzero(~self._is_padding).unbind(1)  # every change: a choice and its new index
        macs = self._macs(indices)
        while True:
            # Those of inactive choices leave the MACs as they are, so that they never help.
            neighbours = indices[:, None].repeat(1, len(choices), 1)
            neighbours[:, range(len(choices)), choices] = values
            neighbours *= self._active(neighbours)
            reached = self._macs(neighbours)
            highest, change = reached.masked_fill(reached > limit, 0).max(1)
            if (highest <= macs).all():
                return indices[macs.argmax()]
            helps = highest > macs
            indices = torch.where(helps[:, None], neighbours[range(len(indices)), change], indices)
            macs = torch.where(helps, highest, macs)

    def _macs(self, indices: Tensor) -> Tensor:
        """MACs, [...], of choice indices, [..., n]; float64, which holds these integers exactly."""
        return complexity.macs(self.space, self.space.one_hot_of_indices(indices))

    def _check_budget(self, flops: float | str) -> float:
        limit, low, high = parse_count(flops), self.macs_min, self.macs_max
        reach = f'the archs of this space have {format_count(low)} to {format_count(high)} MACs'
        if limit < low:
            raise ValueError(f'flops={flops!r} is too small a budget: {reach}; give flops={low} or more')
        if limit > high * 1.01:  # people type rounded figures
            raise ValueError(f'flops={flops!r} is more than any arch uses: {reach}; give flops={high} for the largest')
        return min(limit, high)

    def propose_for_params(self, params: float | str) -> Arch:
        """Of the proposals at 256 budgets over the whole range, the one of most MACs whose parameters fit.

        Args:
            params: The most parameters that the subnet may have: a number, or a string such as '6M'.

        Raises:
            ValueError: If the smallest arch has more parameters, no arch has as many, or `params` is no number.
        """
        limit = parse_count(params, 'params')
        low, high = (complexity.params(self.space, arch) for arch in (self.space.smallest, self.space.largest))
        if limit < low:
            reach = f'{format_count(low)} to {format_count(high)} parameters'
            raise ValueError(
                f'params={params!r} is too small a budget: the archs of this space have {reach}; '
                f'give params={low} or more')
        if limit > high * 1.01:
            raise ValueError(
                f'params={params!r} is more than any arch has; give params={high} for the largest')
        budgets = torch.linspace(self.macs_min, self.macs_max, 256, dtype=torch.float64, device='cpu')
        archs = list(dict.fromkeys(self.propose_many(budgets.tolist())))
        macs, sizes = complexity.macs(self.space, archs).tolist(), complexity.params(self.space, archs).tolist()
        # The proposal at the lowest budget is the smallest arch, so that at least one fits.
        best = max((i for i, size in enumerate(sizes) if size <= limit), key=lambda i: (macs[i], sizes[i]))
        return archs[best]


def _as_budgets(budgets: Tensor) -> Tensor:
    budgets = torch.as_tensor(budgets, dtype=torch.float64, device='cpu')
    if budgets.dim() != 1:
        raise ValueError(f'budgets must be a tensor of shape [B], got the shape {list(budgets.shape)}')
    return budgets
