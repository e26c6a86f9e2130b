"""The connectors: one hand-off protocol a file, and the registry of them."""
