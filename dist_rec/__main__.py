"""`python -m dist_rec` is the console command `dist-rec`; torchrun starts it this way."""

from .cli import main

main()
