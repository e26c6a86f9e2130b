"""Tests of what a user runs before the gateway itself: make, the image, the compose file, the examples in config/."""
