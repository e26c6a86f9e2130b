"""The gateway's use of the operating system and the interpreter: sockets, signals, memory."""
