"""Speed, side by side: agreement first, then the time. `python -m benchmarks.op --help`."""
