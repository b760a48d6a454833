"""What a person asks of an installation or a model: what runs, how fast, in how much memory, how exactly."""
