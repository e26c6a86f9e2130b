"""Outlier detection: backends that are alive and do badly."""
