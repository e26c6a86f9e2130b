"""What clients ask: bodies, forms and endpoints, without I/O."""
