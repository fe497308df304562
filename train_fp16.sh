#!/usr/bin/env bash
# The job of train.sh in mixed precision; takes the same variables and flags. On a CPU too.
#   O0 float32   O1 autocast, loss scaling   O2 as O1, and float16 gradients over the network   O3 everything float16
FP16_OPT_LEVEL=${FP16_OPT_LEVEL:-O2}

export FP16_OPT_LEVEL PRECISION=fp16
exec bash "$(dirname -- "$0")/train.sh" "$@"
