"""``python -m calotype`` is ``calotype``."""

from calotype.runtime.cli import main

main()
