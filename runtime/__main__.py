"""``python -m calotype.runtime`` is ``calotype``."""

from calotype.runtime.cli import main

main()
