"""The protocol between prefill and decode, without I/O: makes each leg's body from the client's body and prefill's
answer."""
