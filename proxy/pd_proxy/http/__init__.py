"""HTTP/1.1: the client for engines, the server for clients, limits and deadlines."""
