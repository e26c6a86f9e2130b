"""Sinks for what the gateway saw: Prometheus and logs. `records.py` has what the other rooms may know of it."""
