"""The architecture generator (AG) of ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300): from a budget to an arch.

An LSTM makes the choices of a search space one after the other, given the budget and the choices so far. Each choice is
hard; gradients pass through its softmax (straight-through Gumbel-softmax, Jang et al., ICLR 2017, arXiv 1611.01144). So
the generator learns from any function of its one-hots: their MACs, or a task loss.

A budget is an upper bound on MACs (multiply-accumulates per image at batch 1), or on another resource. The generator
minimises `generator_loss`; `proposals` chooses the arch for a budget among its samples.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ..space.core import Arch, SearchSpace
from ..space.resources import MACS, Resource
from . import proposals
from .choices import ChoiceTable

__all__ = ['ArchitectureGenerator', 'Rollout', 'generator_loss', 'resource_loss']

SAMPLES = 64  # candidates of a proposal besides the likeliest arch


def resource_loss(counts: Tensor, budgets: Tensor, least: float, most: float) -> Tensor:
    """The resource term: mean over the batch of `((C - b) / (C_max - C_min))**2`.

    Args:
        counts: C, the MACs of the archs, or what they use of another resource, [B].
        budgets: b, their budgets, [B].
        least, most: C_min and C_max, of the smallest and the largest arch of the space.
    """
    span = most - least or 1  # a space may hold a single arch
    return ((counts - budgets) / span).square().mean()


def generator_loss(task_loss: Tensor | float, resource: Tensor, weight: float) -> Tensor:
    """The loss of the architecture generator: `L = L_task(w, masks(arch)) + lambda * L_resource`.

    Args:
        task_loss: L_task, the loss of the supernet with weights w, masked to the generated arch; 0 without images.
        resource: L_resource, see `resource_loss`.
        weight: lambda.
    """
    return task_loss + weight * resource


class Rollout(NamedTuple):
    """Archs generated for B budgets: one decision for each of n choices, inactive ones included."""
    one_hots: tuple[Tensor, ...]  # per choice [B, number of values], exactly 0 and 1, with straight-through gradients
    indices: Tensor  # [B, n], int64
    log_prob: Tensor  # [B]: log-probability of the active choices, without the Gumbel noise


class ArchitectureGenerator(nn.Module):
    """LSTM that maps budgets to archs of one search space.

    It stays on the CPU in float32 and ignores `.to(...)`: it is tiny, and on a GPU each of its decisions would cost a
    synchronisation. All its randomness comes from the `torch.Generator`s that it is given.

    Args:
        space: A bound search space (the `space` of a model).
        hidden_size: Width of the LSTM.
        seed: Seed of the initial weights; the global random state is neither read nor written.
        resource: What budgets bound: MACs, or another resource.

    Attributes:
        budget_min, budget_max: What the smallest and the largest arch use of the resource.

    Raises:
        ValueError: If the space is not bound.
    """

    def __init__(self, space: SearchSpace, hidden_size: int = 64, seed: int = 0, resource: Resource = MACS) -> None:
        super().__init__()
        self.space = space
        self.hidden_size = hidden_size
        self.resource = resource
        self.budget_min, self.budget_max = resource.range(space)
        self.choices = ChoiceTable(space)
        steps, most = len(self.choices), self.choices.most
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            data = torch.empty(shape, dtype=torch.float32, device='cpu')
            return nn.Parameter(data.uniform_(-1, 1, generator=generator) / math.sqrt(hidden_size))

        self.budget_weight = parameter(2, 4 * hidden_size)
        self.step_weight = parameter(most + hidden_size, 4 * hidden_size)  # reads the previous choice and the state
        self.bias = parameter(4 * hidden_size)  # input, forget and output gates, and the cell's candidate
        # All choices are padded to the same number of values, so that the heads are slices of one tensor.
        self.head_weight = parameter(steps, hidden_size, most)
        self.head_bias = parameter(steps, most)

    def _apply(self, fn: Callable, recurse: bool = True) -> ArchitectureGenerator:
        return self  # neither moved nor cast: see the class

    # -- sampling archs ------------------------------------------------------------------------------------------------

    def forward(self, budgets: Tensor, *, noise: torch.Generator | None = None, tau: float = 1.0) -> Rollout:
        """Generate one arch for each budget.

        Args:
            budgets: MACs, or in the unit of the resource, [B]; a budget out of the space's range counts as the nearer
                end.
            noise: Source of the Gumbel noise that makes the archs samples. `None` takes the likeliest value of each
                choice.
            tau: Temperature of the softmax that gradients pass through; it changes no decision.

        Raises:
            ValueError: If `budgets` is not one-dimensional or `tau` is not positive.
        """
        if not tau > 0:
            raise ValueError(f'tau={tau!r} must be positive, such as 1.0')
        budgets = _as_budgets(budgets)
        return self._roll(budgets, None if noise is None else self._gumbel(len(budgets), noise), tau, torch.float32)

    def _roll(self, budgets: Tensor, gumbel: Tensor | None, tau: float, dtype: torch.dtype,
              given: Tensor | None = None) -> Rollout:
        """`forward` with given Gumbel noise, [B, n, most values], or given choice indices, [B, n]; in `dtype`."""
        batch, hidden_size = len(budgets), self.hidden_size
        with torch.autocast('cpu', enabled=False):
            step_weight, heads = self.step_weight.to(dtype), self.head_weight.to(dtype).unbind(0)
            head_biases = self.head_bias.to(dtype).masked_fill(self.choices.is_padding, -math.inf).unbind(0)
            noises: Sequence[Tensor | float] = [0.] * len(heads) if gumbel is None else gumbel.to(dtype).unbind(1)
            positions = self._positions(budgets).to(dtype)
            from_budget = torch.addmm(self.bias.to(dtype), positions, self.budget_weight.to(dtype))

            previous = from_budget.new_zeros(batch, self.choices.most)
            hidden = cell = from_budget.new_zeros(batch, hidden_size)
            all_logits: list[Tensor] = []
            all_indices: list[Tensor] = []
            one_hots: list[Tensor] = []
            for head, head_bias, noise in zip(heads, head_biases, noises):
                gates = torch.addmm(from_budget, torch.cat((previous, hidden), 1), step_weight)
                enter, forget, leave = gates[:, :3 * hidden_size].sigmoid().chunk(3, 1)
                cell = forget * cell + enter * gates[:, 3 * hidden_size:].tanh()
                hidden = leave * cell.tanh()
                logits = torch.addmm(head_bias, hidden, head)
                noisy = logits + noise
                index = noisy.argmax(-1, keepdim=True) if given is None else given[:, len(one_hots), None]
                previous = torch.zeros_like(logits).scatter_(1, index, 1.)
                if noisy.requires_grad and given is None:
                    soft = (noisy / tau).softmax(-1)
                    previous = previous + (soft - soft.detach())  # adds exactly 0, and the gradient of the softmax
                all_logits.append(logits)
                all_indices.append(index)
                one_hots.append(previous)

            indices = torch.cat(all_indices, 1)
            log_probs = torch.stack(all_logits, 1).log_softmax(-1).gather(-1, indices[..., None])[..., 0]
        return Rollout(
            one_hots=tuple(one_hot[:, :len(choice.values)]
                           for one_hot, choice in zip(one_hots, self.space.choices)),
            indices=indices,
            log_prob=(log_probs * self.choices.active(indices)).sum(-1))

    def _positions(self, budgets: Tensor) -> Tensor:
        """Normalised budgets, [B, 2]: position in the range of MACs and in the range of their logarithm, -1 to 1.

        The logarithm separates the smallest budgets, which lie close together in a wide range of MACs.
        """
        budgets = budgets.clamp(self.budget_min, self.budget_max)
        linear = (budgets - self.budget_min) / (self.budget_max - self.budget_min or 1)
        logarithmic = (budgets / self.budget_min).log() / (math.log(self.budget_max / self.budget_min) or 1.)
        return torch.stack((linear, logarithmic), dim=-1) * 2 - 1

    def _gumbel(self, rows: int, noise: torch.Generator) -> Tensor:
        """Gumbel noise, [rows, n, most values]: float64, in which no logarithm is of 0."""
        uniform = torch.rand(
            rows, len(self.choices), self.choices.most, generator=noise, dtype=torch.float64, device='cpu')
        return -(-uniform.log()).log()

    @torch.no_grad()
    def sample(self, budgets: Tensor, noise: torch.Generator) -> list[Arch]:
        """Sample an arch for each budget (MACs, [B]); its MACs are close to the budget, above or below.

        Raises:
            ValueError: If `noise` is not a `torch.Generator` or `budgets` is not one-dimensional.
        """
        if not isinstance(noise, torch.Generator):
            raise ValueError(f'sample needs a torch.Generator, got {noise!r}; try torch.Generator().manual_seed(0)')
        return [self.space.decode(indices) for indices in self(budgets, noise=noise).indices.tolist()]

    def log_prob(self, budgets: Tensor, indices: Tensor) -> Tensor:
        """Log-probability of sampled decisions, as a `Rollout` has them. Its gradient passes through no decision.

        Args:
            budgets: MACs, [B].
            indices: Choice indices, [B, n], those of inactive choices included.

        Returns:
            [B]: the sum over active choices.
        """
        return self._roll(_as_budgets(budgets), None, 1., torch.float32, indices).log_prob

    # -- learning the resource constraint ------------------------------------------------------------------------------

    def resource_loss(self, budgets: Tensor, one_hots: Sequence[Tensor]) -> Tensor:
        """`resource_loss` of archs given as one-hots, whose exact MACs (or other resource) are differentiable.

        Args:
            budgets: MACs, [B].
            one_hots: Per choice [B, number of values], as in a `Rollout`.

        Returns:
            A differentiable float64 scalar.
        """
        counts = self.resource.count(self.space, one_hots)
        return resource_loss(counts, _as_budgets(budgets), self.budget_min, self.budget_max)

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
        """Learn to meet budgets, from the resource term alone: no images, seconds on one core.

        Adam; the learning rate falls to 0 and the temperature from 1 to 0.3, both linearly.

        Args:
            steps: Number of updates.
            batch_size: Budgets per update, over the whole range and including both ends.
            lr: Initial learning rate.
            weight: Weight of the resource loss, lambda in the paper.
            seed: Seed of the budgets and the noise.
            progress: Show a progress bar if the standard error stream is a terminal.

        Raises:
            ValueError: If `batch_size` is less than 2.
        """
        if batch_size < 2:
            raise ValueError(f'batch_size={batch_size!r} must be 2 or more: each batch has both ends of the range')
        noise = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr)
        bar = tqdm(range(steps), desc='fitting the generator', unit='step', disable=None if progress else True)
        for step in bar:
            done = step / steps
            budgets = self._fit_budgets(batch_size, noise)
            one_hots = self(budgets, noise=noise, tau=1 - 0.7 * done).one_hots
            loss = generator_loss(0., self.resource_loss(budgets, one_hots), weight)
            optimizer.zero_grad()
            loss.backward()
            # Straight-through gradients have rare large outliers, each of which would undo many steps.
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.param_groups[0]['lr'] = lr * (1 - done)
            optimizer.step()
        optimizer.zero_grad()
        return self

    def _fit_budgets(self, count: int, noise: torch.Generator) -> Tensor:
        """Budgets of one update, [count]: even over the range of MACs and, every second one, over its logarithm.

        The ends are the hardest to learn, because only one arch is right there. So the range is stretched by 5% on
        either side, and what lies outside is moved to the nearer end.
        """
        parts = torch.arange(count, dtype=torch.float64, device='cpu')
        share = (parts + torch.rand(count, generator=noise, dtype=torch.float64, device='cpu')) / count
        share = (share * 1.1 - 0.05).clamp(0, 1)
        share[0], share[-1] = 0, 1
        linear = self.budget_min + share * (self.budget_max - self.budget_min)
        logarithmic = self.budget_min * (self.budget_max / self.budget_min) ** share
        return torch.where(parts % 2 == 0, linear, logarithmic)

    # -- an arch for a budget ------------------------------------------------------------------------------------------

    def propose(self, flops: float | str) -> Arch:
        """The arch for a budget, which it never exceeds. It depends on the weights and the budget alone.

        Candidates are the likeliest arch and a fixed set of samples. The most probable one that uses at least 99% of
        the budget is taken. If there is none, the largest ones within the budget are enlarged by single choices.

        Args:
            flops: Budget in MACs: a number, or a string such as '1.4G'. If the generator has another resource, in its
                unit, such as '8ms'.

        Warns:
            BudgetWarning: If the budget is above the largest arch, which is returned.

        Raises:
            ValueError: If the budget is below the smallest arch or not a number.

        Example:
            >>> from timm_shiftnas.space import macs, shiftformer_space
            >>> space = shiftformer_space(embed_dim=(32, 48, 64), depth=(1, 2), num_heads=(1, 2), mlp_ratio=(1., 2.))
            >>> space = space.bind(  # the space of a model is bound: timm.create_model(...).space
            ...     img_size=(32, 32), patch_size=(8, 8), in_chans=3, num_classes=10, class_token=True,
            ...     no_embed_class=False, pos_embed=True, relative_position=True, max_relative_position=3,
            ...     qkv_bias=True, proj_bias=True, final_norm=True, global_pool='avg')
            >>> generator = ArchitectureGenerator(space).fit(steps=10, progress=False)
            >>> 0.9e6 < macs(space, generator.propose('1M')) <= 1e6
            True
        """
        return proposals.propose(self, flops)

    def propose_many(self, budgets: Sequence[float | str]) -> list[Arch]:
        """`propose` for several budgets at once, with the same results and errors."""
        return proposals.propose_many(self, budgets)

    def propose_for_params(self, params: float | str) -> Arch:
        """`propose_within` a number of parameters, such as '6M', with the same errors."""
        return proposals.propose_for_params(self, params)

    def propose_within(self, budgets: Mapping[Resource, float | str]) -> Arch:
        """The arch within budgets of several resources, or of others than the generator's.

        Of the proposals at 256 budgets over the whole range, the largest one that fits is taken. If it uses less than
        99% of every budget, the largest ones that fit are enlarged by single choices as far as all budgets allow.

        Args:
            budgets: Numbers, or strings with a unit such as '5MB', by resource.

        Raises:
            ValueError: If no arch fits, or a budget is not a number with a unit of its resource.
        """
        return proposals.propose_within(self, budgets)

    @torch.no_grad()
    def candidates(self, budgets: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of a proposal: for each budget the likeliest arch and 64 samples with fixed noise.

        Computed in float64, so that rounding, which depends on the machine and the batch size, changes no choice.

        Args:
            budgets: MACs, float64 [B].

        Returns:
            Choice indices [B, 65, n], 0 for inactive choices, and log-probabilities [B, 65].
        """
        gumbel = self._gumbel(SAMPLES, torch.Generator().manual_seed(0))
        gumbel = torch.cat((torch.zeros_like(gumbel[:1]), gumbel))
        shape = len(budgets), len(gumbel)
        rollout = self._roll(
            budgets.repeat_interleave(shape[1]), gumbel.repeat(shape[0], 1, 1), tau=1.0, dtype=torch.float64)
        indices = rollout.indices * self.choices.active(rollout.indices)
        return indices.unflatten(0, shape), rollout.log_prob.view(shape)


def _as_budgets(budgets: Tensor) -> Tensor:
    budgets = torch.as_tensor(budgets, dtype=torch.float64, device='cpu')
    if budgets.dim() != 1:
        raise ValueError(f'budgets must be a tensor of shape [B], got the shape {list(budgets.shape)}')
    return budgets
