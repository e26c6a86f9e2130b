"""Bytes: the HTTP/1.1 client for the legs and the path from an engine's socket to the client's. Knows no pools."""
