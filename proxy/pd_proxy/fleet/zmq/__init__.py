"""Messages that engines send to the gateway over ZeroMQ: registrations, transfer notifications and KV events."""
