"""Adapters: changes of a model's weights that are chosen per call."""
