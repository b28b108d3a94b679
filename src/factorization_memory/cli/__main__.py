"""`python -m factorization_memory.cli` is `fmem`."""

from factorization_memory.cli import main

main()
