"""What every API stands on: who gets in, how much one may ask for, what is answered, counted and logged."""
