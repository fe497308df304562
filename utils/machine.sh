# Sourced by train.sh, after python.sh: what the machine and its environment mean for a run.
#
# choose_devices    reads GPUS, NPROC, CUDA_VISIBLE_DEVICES and PYTHON; sets NPROC and VISIBLE, what CUDA_VISIBLE_DEVICES is to be
#                   (KEEP: as it is)
# foreign_variables prints the names of the variables that other launchers have set and torchrun, or a process of it, would follow
# is_name_of_wsl X  whether X is only what WSL calls the computer: it sets NAME to that
#
# Bash 3.2 (macOS) is enough.

KEEP=' '

choose_devices() {
    local none_here="there is no GPU here: nvidia-smi lists none, and no driver of one is loaded. GPUS=cpu trains on the CPU."
    local asked listed=0 named=0 device names=,
    asked=$(tr -s ' ,\t' ',' <<<"$GPUS")
    asked=${asked#,} asked=${asked%,}
    VISIBLE=$KEEP
    case $asked in
    mps | MPS) fail "GPUS=$GPUS: GPUS chooses GPUs of CUDA or ROCm. An Apple GPU: bash train.sh --device mps" ;;
    cpu | CPU | none | -1)
        VISIBLE='' NPROC=${NPROC:-1}
        return ;;
    '' | all | ALL)
        if [ "${CUDA_VISIBLE_DEVICES-unset}" != unset ]; then
            # What a batch system has chosen; -1, NoDevFiles and nothing at all mean none.
            case $CUDA_VISIBLE_DEVICES in [0-9]* | GPU-* | MIG-*) named=$(count_names "$CUDA_VISIBLE_DEVICES") ;; esac
            [ "$named" -gt 0 ] || [ -z "$asked" ] ||
                fail "GPUS=$GPUS: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES hides every GPU. Unset it, or name devices: GPUS=0,1"
            [ "$named" = 0 ] || [ "${DRY_RUN:-}" = 1 ] || ! lacks_gpu || fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES, $none_here"
        else
            named=$(listed_gpus)
            if [ "$named" = 0 ] && [ -n "$asked" ]; then        # where nvidia-smi is not installed, PyTorch may see GPUs
                ! lacks_gpu || fail "GPUS=$GPUS: $none_here"
                named=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || named=0
                [ "$named" -gt 0 ] || fail "GPUS=$GPUS: neither nvidia-smi nor PyTorch sees a GPU here. GPUS=cpu trains on the CPU."
            fi
            # Named one by one, so that train.py refuses a PyTorch that cannot use them, in place of training on the CPU.
            [ "$named" = 0 ] || VISIBLE=$(seq -s , 0 $((named - 1))) VISIBLE=${VISIBLE%,}
        fi
        [ "$named" -gt 0 ] || named=1 ;;
    *)
        asked=${asked//cuda:/}
        listed=$(listed_gpus)
        for device in ${asked//,/ }; do
            case $device in
            *[!0-9]*)
                case $device in
                GPU-* | MIG-*) ;;
                *) fail "GPUS=$GPUS: '$device' is no device. Name them by number (0,1 or cuda:0,cuda:1) or by the identifiers of" \
                    "nvidia-smi -L (GPU-..., MIG-...), or take all or cpu" ;;
                esac ;;
            *)
                [ "$listed" = 0 ] || [ "$device" -lt "$listed" ] || [ "${DRY_RUN:-}" = 1 ] ||
                    fail "GPUS=$GPUS: there is no GPU $device, nvidia-smi lists $listed, from 0 on. (GPUS names devices: GPUS=0,1" \
                        "for two of them.)" ;;
            esac
            case $names in *,"$device",*) fail "GPUS=$GPUS names $device twice. Several processes on it: NPROC" ;; esac
            names=$names$device,
        done
        [ "$listed" != 0 ] || [ "${DRY_RUN:-}" = 1 ] || ! lacks_gpu || fail "GPUS=$GPUS: $none_here"
        VISIBLE=$asked
        named=$(count_names "$asked") ;;
    esac
    NPROC=${NPROC:-$named}
}

count_names() {
    tr ',' '\n' <<<"$1" | grep -c '[^ ]'
}

# Kubeflow's PET_NNODES would have torchrun wait for other nodes, without end.
foreign_variables() {
    compgen -e | grep -E '^(PET_.*|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|TORCHELASTIC_(RUN_ID|USE_AGENT_STORE|RESTART_COUNT))$' || true
}

is_name_of_wsl() {
    [ -n "${WSL_DISTRO_NAME:-}${WSL_INTEROP:-}" ] || grep -qi microsoft /proc/sys/kernel/osrelease 2>/dev/null || return 1
    [ -n "$1" ] && [ "$(tr '[:upper:]' '[:lower:]' <<<"$1")" = "$(uname -n | tr '[:upper:]' '[:lower:]')" ]
}
