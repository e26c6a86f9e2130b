"""Commands of `pd-proxy` that need no gateway of their own."""
