"""The small benchmarks: ``python -m benchmarks.micro`` lists them."""
