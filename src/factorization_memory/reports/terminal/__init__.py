"""Records as tables and sentences on a terminal, through rich."""
