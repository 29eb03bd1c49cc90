"""How close simulated runs are to real ones, and how hard: `python -m benchmarks.calibration`."""
