"""The application, ``dynrank[train]``: the commands, their configuration, tasks, models, runs, reports and plans."""
