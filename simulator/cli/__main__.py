"""``python -m simulator.cli``, the command line where the script ``moesim`` is not installed."""

from simulator.cli import main

main()
