"""How a gateway is put together: its parts, its surfaces, and the order in which they start and stop."""
