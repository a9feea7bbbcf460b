"""`python -m retrograd` is the command line."""

from retrograd.cli import run

run()
