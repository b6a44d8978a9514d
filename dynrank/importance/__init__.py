"""How much the updates of each layer have lowered the loss, measured in the steps of a run."""
