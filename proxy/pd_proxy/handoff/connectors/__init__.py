"""The connectors, with one file for each hand-off protocol, and their registry."""
