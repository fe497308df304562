#!/usr/bin/env bash
# Trains as train.sh does, in mixed precision, with the same variables and flags. Works on CPUs too.
#   O0 float32   O1 autocast, loss scaling   O2 as O1, and float16 gradients over the network   O3 everything float16
FP16_OPT_LEVEL=${FP16_OPT_LEVEL:-O2}

export FP16_OPT_LEVEL PRECISION=fp16
exec bash "$(dirname -- "$0")/train.sh" "$@"
