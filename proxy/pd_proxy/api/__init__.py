"""The HTTP surface: routes, authentication, and errors turned into answers."""
