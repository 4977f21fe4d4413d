#!/bin/sh
# What a GPU makes of split training, in at most 8 minutes; the figures go to ${OUT:-.}/gpu.json.
#
#     sh benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
exec timeout 480 python -m benchmarks.gpu --output "${OUT:-.}/gpu.json" "$@"
