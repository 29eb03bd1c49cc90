"""Registration without a hint, on pairs whose truth is known: accuracy, verdicts, scale, bad input.

`python -m benchmarks.registration [part …] [--out DIR] [--seeds A:B] [--slide FILE=MPP …]`
"""
