"""One request's life. The only room that knows the order of things."""
