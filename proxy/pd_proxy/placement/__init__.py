"""Which backend: pure functions from what is known of the fleet to a decision that says why."""
