"""Speed and memory, measured: `python -m benchmarks NAME` runs `benchmarks/NAME.py`."""
