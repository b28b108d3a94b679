"""What runs leave on disk: the words that their records use."""
