#!/usr/bin/env bash
# The ViT paper's protocol: tries learning rates on held-out training images, trains on all training images with the best one,
# and tests once. Has the variables and flags of train.sh. Run the same command again after an interruption to continue.
#   DATASET=cifar100 MODEL_TYPE=ViT-B_16 NUM_STEPS=500 NAME=c100 bash sweep.sh --val_fraction 0.1
# Also chooses the weight of the attention loss:
#   PRETRAINED_DIR=output/step1 ATTENTION_LOSS_WEIGHTS=0,0.1,1,10 bash sweep.sh --attention_edits output/step1/edits
ATTENTION_LOSS_WEIGHTS=${ATTENTION_LOSS_WEIGHTS:-}
LEARNING_RATES=${LEARNING_RATES:-}                                 # 0.001,0.003,0.01,0.03; or rates around the recipe's

# Started with sh, dash or zsh: run it with bash.
[ -n "${BASH_VERSION:-}" ] || { command -v bash >/dev/null || { echo "$0: error: bash is needed" >&2; exit 2; }; exec bash "$0" "$@"; }
set +o posix
set -euo pipefail

export VIT_CALLED_FROM=$PWD
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(readlink -f "$script")
CDPATH='' cd -- "$(dirname -- "$script")"
source utils/python.sh
use_python requirements.txt torch torchvision numpy scipy tensorboard tqdm ml_collections matplotlib safetensors
[ -z "$ATTENTION_LOSS_WEIGHTS" ] || set -- --attention_loss_weights="$ATTENTION_LOSS_WEIGHTS" "$@"
[ -z "$LEARNING_RATES" ] || set -- --learning_rates="$LEARNING_RATES" "$@"
exec "$PYTHON" sweep.py "$@"
