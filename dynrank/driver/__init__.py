"""Taking a schedule through a run, whoever trains."""
