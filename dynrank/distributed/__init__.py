"""Training in several processes: exchange of values, comparison of adapters, sharding of the frozen base."""
