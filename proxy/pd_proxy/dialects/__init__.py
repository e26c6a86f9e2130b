"""What engines answer: server-sent events, usage and errors, for each API."""
