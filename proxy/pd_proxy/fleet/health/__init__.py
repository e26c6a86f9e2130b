"""Whether backends are alive, and what they say of themselves."""
