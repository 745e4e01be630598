"""`python -m helexa.cli`."""

from helexa.cli import main

main()
