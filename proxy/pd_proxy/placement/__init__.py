"""Placement: pure functions that choose the backends of a request, and give the reason."""
