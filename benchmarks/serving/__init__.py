"""Servers under the same traffic, in turns: ours by three policies, and what people use instead."""
