# SPDX-License-Identifier: Apache-2.0
"""The noise of each node's plan, so that all its steps keep to the job's privacy budget (METHOD §6)."""

from collections.abc import Mapping

from fedpipe_api.accounting import NOISE_LIMIT, Steps, epsilon, noise_multiplier, sampling_rate
from fedpipe_api.privacy import Privacy
from fedpipe_api.wire import NodePlan

Spent = Mapping[str, tuple[Steps, ...]]


def steps_of(plan: NodePlan, samples: int, rounds: int = 1) -> Steps:
    """Return the private steps of so many rounds of a plan, on a node with so many samples."""
    assert plan.noise_multiplier is not None
    rate = sampling_rate(plan.micro_batch * plan.accumulation, samples)
    return Steps(plan.noise_multiplier, rate, rounds * plan.local_steps)


def with_noise(
    plans: Mapping[str, NodePlan], privacy: Privacy, samples: Mapping[str, int], spent: Spent, rounds: int
) -> tuple[dict[str, NodePlan], dict[str, str]]:
    """Return the plans with the least noise that `rounds` more rounds need, and why others get none.

    Args:
        plans: by node.
        privacy: the job's.
        samples: rows that each node trains on.
        spent: what each node has done; nothing where it is missing.
        rounds: still to train.
    """
    noisy, left_out = {}, {}
    for node, plan in plans.items():
        before = spent.get(node, ())
        if privacy.delta > 1 / samples[node]:
            left_out[node] = too_large_delta(privacy, samples[node])
            continue
        rate = sampling_rate(plan.micro_batch * plan.accumulation, samples[node])
        noise = noise_multiplier(
            before, rate, max(1, rounds) * plan.local_steps, privacy.epsilon, privacy.delta
        )
        if noise is None:
            left_out[node] = _unmet(privacy, plan, rate, before, rounds)
        else:
            noisy[node] = plan.model_copy(update={"noise_multiplier": noise})
    return noisy, left_out


def too_large_delta(privacy: Privacy, samples: int) -> str:
    """Return the line on a delta with which a row may be published whole."""
    return f"spec.privacy.delta: {privacy.delta:g} is above 1/{samples}, of its rows; lower it"


def _unmet(privacy: Privacy, plan: NodePlan, rate: float, before: tuple[Steps, ...], rounds: int) -> str:
    """Say what the rounds asked for would need, and how many rounds the budget would do."""

    def needed(count: int) -> float:
        return epsilon((*before, Steps(NOISE_LIMIT, rate, count * plan.local_steps)), privacy.delta)

    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= privacy.epsilon else (low, middle)
    fewer = f", or train {low} of these rounds" if low else ""
    return (
        f"spec.privacy.epsilon: {privacy.epsilon:g} is too little for {rounds} more rounds of "
        f"{plan.local_steps} steps; raise it to at least {needed(rounds):.3g}{fewer}"
    )
