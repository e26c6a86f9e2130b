"""Clients' requests: bodies, forms and endpoints, without I/O."""
