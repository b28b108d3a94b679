"""A run as one call (session.py), and runs compared on equal terms: contenders, plan, processes, record (comparison.py)."""
