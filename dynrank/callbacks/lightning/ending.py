"""Resuming at an end: behind the last step of a run, or of an epoch that was shorter than epochs are now."""

from __future__ import annotations

from math import inf

from lightning.pytorch import Trainer

from dynrank.callbacks.lightning import private


def end_in_full(trainer: Trainer) -> None:
    """Let a run resumed behind its last step start and end training, with all hooks; call it in ``setup``.

    Lightning calls none, so nothing that was due after the last step (a change of rank, putting an average into the
    model) would be made if the run was killed between its last checkpoint and its end. Where an epoch ended that was
    shorter, as with more processes, Lightning would count empty epochs, and a step in each, up to today's length.
    """
    loop = trainer.fit_loop
    if "run" in vars(loop):
        return
    run = loop.run

    def run_in_full() -> None:
        # run() would skip this call then.
        loop.setup_data()
        batches = loop.epoch_loop.batch_progress
        if batches.current.ready < loop.max_batches < inf:
            batches.is_last_batch = False
        if loop.restarting and loop.max_batches and loop.done:
            loop.reset()
            loop.on_run_start()
            if trainer.lightning_module.automatic_optimization:
                private.number_steps_for_loggers(trainer)
            loop.restarting = False
            loop.on_run_end()
        else:
            run()

    loop.run = run_in_full  # type: ignore[method-assign]
