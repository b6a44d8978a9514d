"""Several processes: agreeing on values, comparing adapters, sharding the frozen base."""
