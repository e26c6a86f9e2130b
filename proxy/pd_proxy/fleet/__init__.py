"""What is known of the backends: pools, leases, health. The only room with mutable state about them."""
