"""Measurements: pytest-benchmark suites of the kernels and the data path, and the command of the GPU's turn."""
