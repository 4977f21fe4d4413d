"""What is timed or counted, and against what: `python -m benchmarks.NAME`."""
