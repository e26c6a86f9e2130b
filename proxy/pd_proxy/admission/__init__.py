"""Admission of requests: bounds, the queue, fairness between clients, and deadlines."""
