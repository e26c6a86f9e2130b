"""Health checks of backends, and what engines report about themselves."""
