#!/usr/bin/env bash
# Sets itself up as train.sh does, and runs the tests and the style check. Arguments go to pytest:
#   bash test.sh                    everything
#   bash test.sh -m 'not slow'      the quick ones
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source utils/python.sh

use_python requirements-test.txt torch torchvision numpy scipy tensorboard tqdm ml_collections matplotlib safetensors pytest ruff
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
