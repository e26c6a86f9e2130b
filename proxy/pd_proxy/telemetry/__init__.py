"""Sinks for the records of requests: Prometheus and logs. `records.py` is the part that other packages may use."""
