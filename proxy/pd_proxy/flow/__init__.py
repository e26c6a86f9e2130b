"""One request's life: placing, leases, legs, tries, resuming. The only package that knows their order."""
