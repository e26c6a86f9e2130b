"""Tests against real vLLM engines that hand their KV cache over with NIXL. Run them with `make test-real`."""
