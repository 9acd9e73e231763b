"""Benchmarks: the speed and memory of the project, compared with other libraries."""
