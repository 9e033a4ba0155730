"""`python -m cocktail_serve.cli`: the same command where its script is not on the PATH."""

from cocktail_serve.cli import main

main()
