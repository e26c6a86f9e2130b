"""Commands of `pd-proxy` that start no gateway."""
