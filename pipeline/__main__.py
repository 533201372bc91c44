"""`python -m pipeline` is the `raylign` command, from a clone as it stands."""

from pipeline.cli import main

main()
