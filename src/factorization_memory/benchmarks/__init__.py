"""Correctness, speed and memory of backends on this machine: JSON-ready results, displayed by the command line."""
