"""NSGA-II (Deb et al., IEEE Transactions on Evolutionary Computation, 2002) over archs, with pymoo.

An arch is the vector of its choice indices, as `SearchSpace.encode` gives them. Importing this module needs pymoo.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.problems.static import StaticProblem

from ..space.core import Arch, SearchSpace

__all__ = ['evolve']


class CanonicalArchs(Repair):
    """Sets inactive choices to 0, so that archs are equal exactly when their vectors are."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space

    def _do(self, problem: Problem, X: np.ndarray, **_: Any) -> np.ndarray:
        return np.array([self.space.encode(self.space.decode(row)) for row in X.tolist()])


class RandomReset(Mutation):
    """Draws each choice anew with probability 1 / (number of choices), all of its values being equally likely."""

    def _do(self, problem: Problem, X: np.ndarray, *, random_state: np.random.Generator, **_: Any) -> np.ndarray:
        drawn = random_state.integers(problem.xl, problem.xu + 1, X.shape)
        return np.where(random_state.random(X.shape) < 1 / problem.n_var, drawn, X)


def evolve(
        space: SearchSpace,
        first: Sequence[Arch],
        population: int,
        score: Callable[[Arch], tuple[Sequence[float], Sequence[float]]],
        seed: int,
) -> Iterator[list[Arch]]:
    """Yield one generation of archs after the other.

    Args:
        space: The search space.
        first: The initial population, of different archs.
        population: Size of the later ones.
        score: Gives two objectives of an arch, which are minimised, and its violations of limits, which are positive
            where a limit is exceeded; it is called for a generation after that generation was yielded.
        seed: Seed of selection, crossover and mutation.
    """
    # a choice with one value has no room between the bounds, which pymoo accepts
    upper = np.array([len(choice.values) - 1 for choice in space.choices])
    problem = Problem(
        n_var=len(upper), n_obj=2, n_ieq_constr=len(score(first[0])[1]), xl=np.zeros_like(upper), xu=upper, vtype=int)
    algorithm = NSGA2(
        pop_size=population, sampling=np.array([space.encode(arch) for arch in first]),
        crossover=UniformCrossover(), mutation=RandomReset(), repair=CanonicalArchs(space), eliminate_duplicates=True)
    algorithm.setup(problem, termination=NoTermination(), seed=seed)
    while algorithm.has_next():
        generation = algorithm.ask()
        if generation is None:  # no offspring differs from its parents
            return
        archs = [space.decode(row) for row in generation.get('X').tolist()]
        yield archs
        objectives, violations = (np.array(values, dtype=float) for values in zip(*map(score, archs)))
        Evaluator().eval(StaticProblem(problem, F=objectives, G=violations), generation)
        algorithm.tell(infills=generation)
