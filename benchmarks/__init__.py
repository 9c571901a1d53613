"""Benchmarks: modules that print a table for people and, as the last line, one JSON object."""
