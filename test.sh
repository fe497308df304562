#!/usr/bin/env bash
# Installs what it needs as train.sh does, and runs the style check and the tests, on up to eight cores. Arguments go to pytest:
#   bash test.sh                    all tests, at small counts
#   bash test.sh -m 'not slow'      the quick ones
#   bash test.sh -n 0 -x            in one process, until the first failure
#   bash test.sh --full             every count and size
#   bash test.sh --reference        only the comparisons with other implementations, which it installs into .venv-reference
# Started with sh, dash or zsh: run it with bash.
[ -n "${BASH_VERSION:-}" ] || { command -v bash >/dev/null || { echo "$0: error: bash is needed" >&2; exit 2; }; exec bash "$0" "$@"; }
set +o posix
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source utils/python.sh

modules=(torch torchvision numpy scipy tensorboard tqdm ml_collections matplotlib safetensors pytest ruff starlette uvicorn playwright
    xdist)
if [ "${1:-}" = --reference ]; then
    shift
    LOCKED='' VENV=.venv-reference use_python requirements-reference.txt "${modules[@]}" \
        timm transformers accelerate vit_pytorch sklearn peft torchao onnx onnxscript onnxruntime
    set -- -m reference "$@"
else
    use_python requirements-test.txt "${modules[@]}"
fi
unset LOCKED VENV           # scripts that the tests start use the Python found here
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
