"""Sinks for what the gateway saw: Prometheus and logs. `records.py` is the part that other packages may use."""
