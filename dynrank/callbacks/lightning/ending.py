"""The end of a run that is resumed behind its last step: what comes after that step is still to be done."""

from __future__ import annotations

from lightning.pytorch import Trainer

from dynrank.callbacks.lightning import private


def end_in_full(trainer: Trainer) -> None:
    """Let a run resumed behind its last step start and end training, with all hooks; call it in ``setup``.

    Lightning calls none, so nothing that was due after the last step (a change of rank, putting an average into the
    model) would be made if the run was killed between its last checkpoint and its end.
    """
    loop = trainer.fit_loop
    if "run" in vars(loop):
        return
    run = loop.run

    def run_in_full() -> None:
        # run() would skip this call then.
        loop.setup_data()
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
