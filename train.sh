#!/usr/bin/env bash
# Fine-tunes a Vision Transformer, with one process per GPU. Edit the variables here, or set them for one run:
#   DATASET=cifar100 MODEL_TYPE=ViT-B_16 GPUS=0,1 NAME=c100 bash train.sh --learning_rate 0.01
# For empty variables train.py uses its defaults (python train.py --help). Flags after the script override the variables.
# DRY_RUN=1 only prints the command.

DATASET=${DATASET:-}                    # digits (embedded, the default) cifar10 cifar100 mnist fashion_mnist imagenet cub200
                                        # flowers102 oxford_pets folder csv
DATA_DIR=${DATA_DIR:-}                  # the folder of the data set, or to download it to: data
RECIPE=${RECIPE:-}                      # the settings of a paper, such as mae, for everything that is not set. Leave it empty for
                                        # your own images: deit, cait and the scratch recipes train without pretrained weights
MODEL_TYPE=${MODEL_TYPE:-}              # a row of configs.py, such as ViT-B_16, DINOv2-S_14, SigLIP-B_16, or a published name
PRETRAINED_DIR=${PRETRAINED_DIR:-}      # a checkpoint file, a run folder, a published name (imagenet21k/ViT-B_16, timm/...), or none
RESUME_PATH=${RESUME_PATH:-}            # run folder (output/NAME) or checkpoint file to continue; overrides PRETRAINED_DIR;
                                        # auto, with a NAME: continue that run if it exists, else start it
NAME=${NAME:-}                          # name of the run; results are written to output/NAME
IMG_SIZE=${IMG_SIZE:-}                  # 224, or height x width: 224x160
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-}  # images per optimizer step, over all GPUs and micro-steps
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-}    # images per evaluation batch and GPU
GRAD_STEPS=${GRAD_STEPS:-}              # micro-steps into which each GPU's part of the batch is divided: auto
NUM_STEPS=${NUM_STEPS:-}                # optimizer steps
NUM_EPOCHS=${NUM_EPOCHS:-}              # passes over the training images, in place of NUM_STEPS
WARMUP_STEPS=${WARMUP_STEPS:-}
DECAY_TYPE=${DECAY_TYPE:-}              # cosine linear step constant
OPTIMIZER=${OPTIMIZER:-}                # sgd adamw adam lamb
LEARNING_RATE=${LEARNING_RATE:-}
WEIGHT_DECAY=${WEIGHT_DECAY:-}
VAL_FRACTION=${VAL_FRACTION:-}          # ratio of the training images held out to choose the best checkpoint, not on the test set
SEED=${SEED:-}
PRECISION=${PRECISION:-}                # auto fp32 tf32 bf16 fp16
FP16_OPT_LEVEL=${FP16_OPT_LEVEL:-}      # O0 O1 O2 O3, with PRECISION=fp16

GPUS=${GPUS:-}                          # for example 0,1; all; cpu; identifiers of nvidia-smi -L. Empty: all GPUs, or the CPU
NPROC=${NPROC:-}                        # processes on this node; empty: the number of GPUs, else 1
NNODES=${NNODES:-1}                     # more than one node: the same command on each, with its NODE_RANK
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-}            # host name or address of node 0
MASTER_PORT=${MASTER_PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-0}         # how often all processes are restarted after one was lost; they continue from the last
                                        # checkpoint

# ---------------------------------------------------------------------------------------------------------------
# Started with sh, dash or zsh: run it with bash.
[ -n "${BASH_VERSION:-}" ] || { command -v bash >/dev/null || { echo "$0: error: bash is needed" >&2; exit 2; }; exec bash "$0" "$@"; }
set +o posix
set -euo pipefail

export VIT_CALLED_FROM=${VIT_CALLED_FROM:-$PWD}      # for hints: train.py is started in the script's folder
# The command that resumes a run repeats the variables that the user has set and no checkpoint holds.
typed=
for name in PYTHON VENV LOCKED GPUS NPROC MAX_RESTARTS NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do
    case $NNODES:$name in 1:N[NO]* | 1:MASTER_*) continue ;; esac            # job systems set these for purposes of their own
    case $(declare -p "$name" 2>/dev/null) in
    'declare -x '*'="'?*'"') typed+="$name=$(printf %q "${!name}") " ;;
    esac
done
export VIT_TYPED=$typed
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(readlink -f "$script")
CDPATH='' cd -- "$(dirname -- "$script")"     # all relative paths are relative to this folder
source utils/python.sh
source utils/machine.sh

for number in NPROC NNODES; do
    [[ "${!number}" =~ ^([1-9][0-9]{0,4})?$ ]] || fail "$number=${!number} is not a positive number"
done
# The port is not checked for one node, which does not use it: Kubernetes sets MASTER_PORT=tcp://... for a service called master.
[ "$NNODES" = 1 ] || [[ "$MASTER_PORT" =~ ^[1-9][0-9]{0,4}$ ]] || fail "MASTER_PORT=$MASTER_PORT is not a positive number"
[[ "$MAX_RESTARTS" =~ ^[0-9]{1,3}$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS is not a number from 0 to 999"
[[ "$NODE_RANK" =~ ^[0-9]{1,5}$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
    fail "NODE_RANK=$NODE_RANK is not one of 0..$((NNODES - 1)). Set NNODES to the number of nodes, or unset NODE_RANK for one node"
if [ "$NNODES" -gt 1 ] && [ -z "$MASTER_ADDR" ]; then
    fail "NNODES=$NNODES needs MASTER_ADDR, the host name or address of node 0 (and NODE_RANK=0..$((NNODES - 1)) on each)"
fi
use_python requirements.txt torch torchvision numpy scipy tensorboard tqdm ml_collections matplotlib safetensors
trap 'exit 143' TERM INT HUP USR1           # a request to stop; after the launch `stop` below handles it
choose_devices
if is_name_of_wsl "$NAME"; then
    echo "train.sh: NAME=$NAME is ignored, because it is the name of this computer, set by Windows. Use --name for the run" >&2
    NAME=''
fi

flags=()
add() { if [ -n "$2" ]; then flags+=("--$1=$2"); fi; }
add dataset "$DATASET"
add data_dir "$DATA_DIR"
add val_fraction "$VAL_FRACTION"
add recipe "$RECIPE"
add model_type "$MODEL_TYPE"
add pretrained_dir "$PRETRAINED_DIR"
add resume_path "$RESUME_PATH"
add name "$NAME"
add img_size "$IMG_SIZE"
add train_batch_size "$TRAIN_BATCH_SIZE"
add eval_batch_size "$EVAL_BATCH_SIZE"
add gradient_accumulation_steps "$GRAD_STEPS"
add num_steps "$NUM_STEPS"
add num_epochs "$NUM_EPOCHS"
add warmup_steps "$WARMUP_STEPS"
add decay_type "$DECAY_TYPE"
add optimizer "$OPTIMIZER"
add learning_rate "$LEARNING_RATE"
add weight_decay "$WEIGHT_DECAY"
add seed "$SEED"
add precision "$PRECISION"
add fp16_opt_level "$FP16_OPT_LEVEL"

# The processes of a machine share its cores; by default torchrun gives each of them only one.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
settings=()
for name in $(foreign_variables); do settings+=(-u "$name"); done
if [ "$NNODES" = 1 ] && [[ "${WORLD_SIZE:-}${PET_NNODES:-}" =~ [2-9]|[0-9]{2} ]]; then
    echo "train.sh: WORLD_SIZE and PET_NNODES are ignored; this run has one node. For more set NNODES, NODE_RANK and MASTER_ADDR" >&2
fi
settings+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + NPROC - 1) / NPROC))}")
launcher=(--standalone)
if [ "$NNODES" -gt 1 ]; then
    settings+=("TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}")      # PyTorch warns with C++ stacks if node 0 is lost
    launcher=(--nnodes "$NNODES" --rdzv_backend nodes --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_conf "rank=$NODE_RANK")
fi
[ "$VISIBLE" = "$KEEP" ] || settings+=("CUDA_VISIBLE_DEVICES=$VISIBLE")
[ "$MAX_RESTARTS" = 0 ] || launcher+=(--max_restarts "$MAX_RESTARTS")
command=(env "${settings[@]}" "$PYTHON" -m utils.distributed.torchrun "${launcher[@]}" --nproc_per_node "$NPROC"
    train.py ${flags[@]+"${flags[@]}"} "$@")

printf '%q ' "${command[@]}"
echo
[ "${DRY_RUN:-}" != 1 ] || exit 0
[ "$VIT_CALLED_FROM" = "$PWD" ] || echo "Paths and commands below are relative to $PWD"

# Bad flags that train.py finds without PyTorch are reported here, once, before the seconds that torchrun takes.
for word in "$@"; do case $word in -h | --help) exec "$PYTHON" train.py --help ;; esac; done
env "${settings[@]}" "VIT_CHECK=$((NPROC * NNODES))x$NPROC" "$PYTHON" train.py ${flags[@]+"${flags[@]}"} "$@" || exit $?

# torchrun returns code 1 for any failure; the processes leave their own code, and their process numbers, in this folder.
VIT_LAUNCH=$(mktemp -d) || fail "cannot make a temporary folder (see above). Set TMPDIR to a folder with free space"
export VIT_LAUNCH
watcher=
trap '[ -z "$watcher" ] || kill -KILL "$watcher" 2>/dev/null || true; rm -rf "$VIT_LAUNCH"' EXIT
asked= unanswered=
any_process() {
    local file
    for file in "$VIT_LAUNCH"/pid-*; do
        if [ -e "$file" ] && kill -0 "$(cat "$file")" 2>/dev/null; then return 0; fi
    done
    return 1
}
posted_code() {                             # of the newest attempt
    local file code=
    for file in "$VIT_LAUNCH"/code-*; do [ ! -s "$file" ] || code=$(cat "$file"); done
    echo "$code"
}
# Signals the processes directly: they finish the step, save and end, for which torchrun would give them only 30 seconds.
# Signals within two seconds are the same request: timeout and batch systems signal a process and its group.
stop() {
    if [ -z "$asked" ]; then
        asked=$SECONDS
        : >"$VIT_LAUNCH/asked"
        if any_process; then
            [ ! -t 2 ] || echo >&2              # ends the line of the progress bar
            echo "train.sh: stopping after this step is finished and saved. Repeat the signal to stop at once" >&2
            kill -USR1 $(cat "$VIT_LAUNCH"/pid-*) 2>/dev/null || true
        else
            case $(posted_code) in '' | 8 | 143) unanswered=1; kill -TERM "$launcher" 2>/dev/null || true ;; esac
        fi
    elif [ $((SECONDS - asked)) -ge 2 ]; then
        kill -KILL "$launcher" $(cat "$VIT_LAUNCH"/pid-*) 2>/dev/null || true
    fi
}
# Kills remaining processes 10 seconds after one has posted the code of a failure: processes that are stopped or hang, for which
# torchrun would wait 30 seconds, or forever. Also kills torchrun, unless it should restart the processes; and if no process is left
# after a request to stop, while torchrun waits for other nodes.
watch() {
    trap '' TERM INT HUP USR1                   # Ctrl-C reaches this shell too
    local file newest failed= since=0 code checks=0 busy idle=0
    while sleep 1 && kill -0 "$launcher" 2>/dev/null; do
        code=$(posted_code)
        case $code in
        '' | 8 | 143)
            if [ -e "$VIT_LAUNCH/asked" ] && ! any_process; then idle=$((idle + 1)); fi
            [ "$idle" -lt 5 ] || kill -KILL "$launcher" || true ;;
        esac
        case $code in '' | 0 | 143) continue ;; esac
        for file in "$VIT_LAUNCH"/code-*; do newest=$file; done
        if [ "$newest" != "$failed" ]; then failed=$newest since=$SECONDS; fi
        [ $((SECONDS - since)) -ge 10 ] || continue
        checks=$((checks + 1)) busy=
        [ $((checks % 3)) = 1 ] || continue     # a process that still writes a checkpoint touches alive-R every second
        for file in "$VIT_LAUNCH"/pid-*; do
            if [ ! -e "$file" ] || [ "$file" -nt "$newest" ]; then continue; fi
            if [ "$VIT_LAUNCH/alive-${file##*pid-}" -nt "$VIT_LAUNCH/checked" ]; then
                busy=1
            else
                kill -KILL "$(cat "$file")" || true
            fi
        done
        : >"$VIT_LAUNCH/checked"
        if [ -n "$busy" ] || [ $((SECONDS - since)) -lt 15 ]; then continue; fi
        case $MAX_RESTARTS:$code in 0:* | *:[2-7]) kill -KILL "$launcher" || true ;; esac
    done
}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}     # for signals sent to torchrun itself (2.12 on)
trap stop TERM INT HUP USR1      # processes that start after a request find the file `asked`
set -m              # gives torchrun its own process group, so that Ctrl-C only reaches this script
(trap '' USR1; exec "${command[@]}") </dev/null &
launcher=$!
set +m
watch </dev/null >/dev/null 2>&1 &
watcher=$!
disown "$watcher"
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" 2>/dev/null || true; done      # a signal only ends one wait
code=0
wait "$launcher" 2>/dev/null || code=$?                                                  # bash keeps the exit code of its child
posted=$(posted_code)
if [ -z "$posted" ] && [ $((NPROC * NNODES)) -gt 1 ] && [ "$code" = 1 ] && compgen -G "$VIT_LAUNCH/pid-*" >/dev/null; then
    echo "train.sh: error: a process of the run was lost, and no other could report it (the output above names it)" >&2
    posted=8
fi
[ -z "$asked" ] || posted=${posted:-143}
[ -z "$unanswered" ] || posted=143
[ "$posted" != 0 ] || posted=$code
exit "${posted:-$code}"
