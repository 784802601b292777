#!/usr/bin/env bash
# Run the tests, on the CPU.
#
#   ./test.sh                     all of them
#   ./test.sh -m "not slow"       the quick ones
#   ./test.sh tests/test_data.py -k aligned      any arguments of pytest; paths are read from this folder
#
# The environment is that of train.sh, with the same variables (PYTHON, VENV), plus what tests need: pytest and the libraries that
# results are compared with. It is made by train.sh's own function, so that the two commands cannot drift apart.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./train.sh

find_python dev pytest transformers safetensors datasets torchdata tensorboard blobfile h5py
export CUDA_VISIBLE_DEVICES="" HIP_VISIBLE_DEVICES=""
exec "$python" -m pytest "$@"
