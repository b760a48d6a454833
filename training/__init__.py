"""How the bundled model ``talbot`` was made: ``python -m training all``."""
