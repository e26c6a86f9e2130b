"""Whether a request may start."""
