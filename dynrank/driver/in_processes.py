"""A change of ranks in a run: computed in process 0 for all processes, and applied while DDP is paused."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dynrank.change.change import Adapters, Change
from dynrank.change.directions import LayerDirections
from dynrank.distributed.wrappers import new_reducers
from dynrank.driver.training import Training
from dynrank.schedules import How


def compute_change(
    training: Training, plan: Callable[[], Mapping[str, int]], directions: LayerDirections, how: How
) -> Change:
    """The change to the ranks that ``plan`` returns; process 0 plans and computes, and nothing changes yet.

    Unless a layer grows, layers of ``directions`` that keep their rank are balanced, too: steps then have the same size
    in all layers.
    """
    adapters = Adapters(training.model, training.optimizers)
    # The seed is the step and nothing else, so growths at one step draw the same rows in runs of any seed. The global
    # generator stays as it is: data and dropout go on as without the growth, and a resumed run draws the same rows.
    generator = torch.Generator().manual_seed(training.step)
    return Change.compute(
        adapters,
        plan,
        directions,
        how.optimizer_state,
        generator,
        balanced=directions.names,
        in_first=True,
        group=training.group,
    )


def apply_change(training: Training, change: Change) -> None:
    """Make ``change``, and let DDP follow; call it within :func:`dynrank.change.interrupts.uninterrupted`."""
    with new_reducers(training.ddp):
        change.apply()
    training.put_back()
