# Sourced by train.sh, after python.sh: chooses devices, and detects what the machine and its environment set for other purposes.
#
# choose_devices    reads GPUS, NPROC, CUDA_VISIBLE_DEVICES and PYTHON; sets NPROC, and VISIBLE to the new CUDA_VISIBLE_DEVICES
#                   (KEEP: unchanged)
# foreign_variables prints the names of variables that other launchers have set and that would affect torchrun or its processes
# is_name_of_wsl X  whether X is the name of the computer, which WSL puts into NAME
#
# Works with Bash 3.2 (macOS).

KEEP=' '

choose_devices() {
    local none_here="there is no GPU here (nvidia-smi lists none, and no driver is loaded). To train on the CPU, set GPUS=cpu"
    local wanted listed=0 named=0 device names=,
    wanted=$(tr -s ' ,\t' ',' <<<"$GPUS")
    wanted=${wanted#,} wanted=${wanted%,}
    VISIBLE=$KEEP
    case $wanted in
    mps | MPS) fail "GPUS=$GPUS: GPUS chooses GPUs of CUDA or ROCm. An Apple GPU: bash train.sh --device mps" ;;
    cpu | CPU | none | -1)
        VISIBLE='' NPROC=${NPROC:-1}
        return ;;
    '' | all | ALL)
        if [ "${CUDA_VISIBLE_DEVICES-unset}" != unset ]; then
            # The choice of a batch system; -1, NoDevFiles and an empty value mean no GPU.
            case $CUDA_VISIBLE_DEVICES in [0-9]* | GPU-* | MIG-*) named=$(count_names "$CUDA_VISIBLE_DEVICES") ;; esac
            [ "$named" -gt 0 ] || [ -z "$wanted" ] ||
                fail "GPUS=$GPUS: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES hides every GPU. Unset it, or name devices: GPUS=0,1"
            [ "$named" = 0 ] || [ "${DRY_RUN:-}" = 1 ] || ! lacks_gpu || fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: $none_here"
        else
            named=$(listed_gpus)
            if [ "$named" = 0 ] && [ -n "$wanted" ]; then        # without nvidia-smi, PyTorch may still find GPUs
                ! lacks_gpu || fail "GPUS=$GPUS: $none_here"
                named=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || named=0
                [ "$named" -gt 0 ] || fail "GPUS=$GPUS: neither nvidia-smi nor PyTorch finds a GPU here. To train on the CPU, set GPUS=cpu"
            fi
            # Each GPU is named, so that train.py fails if PyTorch cannot use it, and does not train on the CPU.
            [ "$named" = 0 ] || VISIBLE=$(seq -s , 0 $((named - 1))) VISIBLE=${VISIBLE%,}
        fi
        [ "$named" -gt 0 ] || named=1 ;;
    *)
        wanted=${wanted//cuda:/}
        listed=$(listed_gpus)
        for device in ${wanted//,/ }; do
            case $device in
            *[!0-9]*)
                case $device in
                GPU-* | MIG-*) ;;
                *) fail "GPUS=$GPUS: '$device' is not a device. Use numbers (0,1 or cuda:0,cuda:1), identifiers of nvidia-smi -L" \
                    "(GPU-..., MIG-...), all, or cpu" ;;
                esac ;;
            *)
                [ "$listed" = 0 ] || [ "$device" -lt "$listed" ] || [ "${DRY_RUN:-}" = 1 ] ||
                    fail "GPUS=$GPUS: there is no GPU $device. nvidia-smi lists $listed, numbered from 0. (GPUS is a list of devices," \
                        "not their number: GPUS=0,1 for two.)" ;;
            esac
            case $names in *,"$device",*) fail "GPUS=$GPUS names $device twice. For several processes on it, set NPROC" ;; esac
            names=$names$device,
        done
        [ "$listed" != 0 ] || [ "${DRY_RUN:-}" = 1 ] || ! lacks_gpu || fail "GPUS=$GPUS: $none_here"
        VISIBLE=$wanted
        named=$(count_names "$wanted") ;;
    esac
    NPROC=${NPROC:-$named}
}

count_names() {
    tr ',' '\n' <<<"$1" | grep -c '[^ ]'
}

# Kubeflow's PET_NNODES, for example, would make torchrun wait for other nodes forever.
foreign_variables() {
    compgen -e | grep -E '^(PET_.*|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|TORCHELASTIC_(RUN_ID|USE_AGENT_STORE|RESTART_COUNT))$' || true
}

is_name_of_wsl() {
    [ -n "${WSL_DISTRO_NAME:-}${WSL_INTEROP:-}" ] || grep -qi microsoft /proc/sys/kernel/osrelease 2>/dev/null || return 1
    [ -n "$1" ] && [ "$(tr '[:upper:]' '[:lower:]' <<<"$1")" = "$(uname -n | tr '[:upper:]' '[:lower:]')" ]
}
