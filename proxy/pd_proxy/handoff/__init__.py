"""The P/D protocol without I/O: what each leg's body is, given the client's body and prefill's answer."""
