"""What the gateway asks of the operating system and the interpreter: sockets, signals, memory."""
