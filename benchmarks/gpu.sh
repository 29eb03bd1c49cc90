#!/usr/bin/env bash
# The trainer on a GPU, in one command of under ten minutes; without a GPU, a tiny model on the CPU.
#
#   benchmarks/gpu.sh [WHEELS]     WHEELS: a folder of what the Python there lacks, as made by
#     pip download -d WHEELS --no-deps --only-binary :all: --python-version 3.12 \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#       pydantic pydantic-core annotated-types typing-inspection simplejpeg
#
# PYTHON is which Python (the project's, else python3), OUT where data and runs go.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ $# -gt 0 ]; then
  "$python" -m pip install --quiet --no-index --no-deps --break-system-packages "$1"/*.whl
fi
exec "$python" -m benchmarks.gpu --out "${OUT:-/tmp/cellpair-gpu}"
