"""Outlier detection: which backends are alive, but fail more often or are slower than others."""
