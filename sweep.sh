#!/usr/bin/env bash
# The ViT paper's protocol: tries learning rates on held-out training images, trains on all of them with the best, tests
# once. Takes the variables and flags of train.sh. Started again after an interruption, it goes on where it stopped.
#   DATASET=cifar100 MODEL_TYPE=ViT-B_16 NUM_STEPS=500 NAME=c100 bash sweep.sh --val_fraction 0.1
LEARNING_RATES=${LEARNING_RATES:-0.001,0.003,0.01,0.03}

set -euo pipefail
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(readlink -f "$script")
CDPATH='' cd -- "$(dirname -- "$script")"
source utils/python.sh
use_python requirements.txt torch torchvision numpy scipy tensorboard tqdm ml_collections matplotlib safetensors
exec "$PYTHON" sweep.py --learning_rates "$LEARNING_RATES" "$@"
