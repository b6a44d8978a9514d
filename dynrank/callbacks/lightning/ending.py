"""Resuming after the last step of a run, or after an epoch that was shorter than epochs are now."""

from math import inf

from lightning.pytorch import Trainer

from dynrank.callbacks.lightning import private


def end_in_full(trainer: Trainer) -> None:
    """Call on_train_start and on_train_end also when a run is resumed after its last step; Lightning skips them.

    Without them the work after the last step (a change of rank, putting an average into the model) would never be done
    in a run that was killed between its last checkpoint and its end. If the checkpoint ends an epoch that was shorter
    than now, as with more processes, Lightning would count empty epochs with a step each. Call this in ``setup``.
    """
    loop = trainer.fit_loop
    if "run" in vars(loop):
        return
    run = loop.run

    def run_in_full() -> None:
        # If there is nothing left to train, run() would not set up the data.
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
