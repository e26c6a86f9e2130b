"""The backends: pools, leases, health, outlier detection. The only package with mutable state about them."""
