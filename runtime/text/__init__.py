"""Prompts: their syntax, their tokens, and what text encoders make of them."""
