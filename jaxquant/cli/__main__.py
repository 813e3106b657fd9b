"""`python -m jaxquant.cli`."""

from jaxquant.cli import main

main()
