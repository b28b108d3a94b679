"""Is a backend right here, how fast is it, and what does it hold: results as JSON-ready dicts, shown by the command line."""
