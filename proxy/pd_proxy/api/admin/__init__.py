"""The routes of operators."""
