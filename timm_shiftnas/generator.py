"""STOPGAP (the author of this file replaces it)."""
import math
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import nn
from . import complexity


class Rollout(NamedTuple):
    one_hots: tuple
    indices: torch.Tensor
    log_prob: torch.Tensor


class ArchitectureGenerator(nn.Module):
    def __init__(self, space, hidden_size=64, seed=0):
        super().__init__()
        self.space, self.hidden_size = space, hidden_size
        self.macs_min, self.macs_max = complexity.macs_range(space)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.V = max(len(c.values) for c in space.choices)
            self.cell = nn.LSTMCell(1 + self.V, hidden_size)
            self.heads = nn.ModuleList(nn.Linear(hidden_size, len(c.values)) for c in space.choices)

    def forward(self, budgets, *, noise=None, tau=1.0):
        b = ((budgets - self.macs_min) / (self.macs_max - self.macs_min) * 2 - 1).float()[:, None]
        prev, state = torch.zeros(len(b), self.V), None
        ones, idx, lp = [], [], 0
        for head in self.heads:
            state = self.cell(torch.cat([b, prev], 1), state)
            logits = head(state[0])
            noisy = logits if noise is None else logits - (-torch.rand(logits.shape, generator=noise).clamp(1e-9).log()).log()
            soft = (noisy / tau).softmax(-1)
            i = noisy.argmax(-1)
            hard = F.one_hot(i, logits.shape[-1]).float() + soft - soft.detach()
            lp = lp + logits.log_softmax(-1).gather(1, i[:, None])[:, 0]
            ones.append(hard); idx.append(i); prev = F.pad(hard, (0, self.V - logits.shape[-1]))
        return Rollout(tuple(ones), torch.stack(idx, 1), lp)

    @torch.no_grad()
    def sample(self, budgets, noise):
        return [self.space.decode(r) for r in self(budgets, noise=noise).indices.tolist()]

    def resource_loss(self, budgets, one_hots):
        return (((complexity.macs(self.space, one_hots) - budgets) / (self.macs_max - self.macs_min)) ** 2).mean()

    def fit(self, steps=1000, batch_size=64, lr=1e-3, weight=1000., seed=0, progress=True):
        opt = torch.optim.Adam(self.parameters(), lr)
        g = torch.Generator().manual_seed(seed)
        for t in range(steps):
            u = torch.rand(batch_size, generator=g, dtype=torch.float64); u[0] = 0; u[-1] = 1
            b = self.macs_min + u * (self.macs_max - self.macs_min)
            loss = weight * self.resource_loss(b, self(b, noise=g, tau=1 - .7 * t / steps).one_hots)
            opt.zero_grad(); loss.backward(); opt.step()
        return self

    @torch.no_grad()
    def propose(self, flops):
        b = complexity.parse_count(flops)
        if b < self.macs_min or b > 1.01 * self.macs_max:
            raise ValueError('out of range')
        archs = [self.space.smallest] + self.sample(torch.full((64,), b, dtype=torch.float64), torch.Generator().manual_seed(0))
        m = complexity.macs(self.space, archs)
        return max((a for a, c in zip(archs, m.tolist()) if c <= b), key=lambda a: complexity.macs(self.space, a))

    def propose_many(self, budgets):
        return [self.propose(b) for b in budgets]
