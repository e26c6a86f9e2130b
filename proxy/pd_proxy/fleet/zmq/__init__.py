"""What engines send to the gateway over ZeroMQ."""
