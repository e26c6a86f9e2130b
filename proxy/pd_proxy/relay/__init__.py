"""The path of an answer's bytes from the engine's socket to the client's. Knows no pools, connectors or APIs."""
