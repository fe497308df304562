# Sourced by train.sh, sweep.sh and test.sh in the project's folder: finds a Python with the packages needed, or makes one.
#
# use_python REQUIREMENTS MODULE...   sets PYTHON
#   Uses the active python3 if it can import every MODULE; else .venv next to the scripts, which is made and filled from the
#   file REQUIREMENTS on first use. DRY_RUN=1 names .venv without making it. $PYTHON, if set, is tried instead of python3.
#   If the active Python has PyTorch but lacks a smaller package, this is an error, because PyTorch is large to install twice.
#   VENV names a folder to use in place of .venv and of the active Python.
#   LOCKED=1: uses only .venv-locked, filled from the .lock file of REQUIREMENTS: exact versions, wheels only, hashes checked.
#   VIT_TORCH_CPU_INDEX: where the CPU build of PyTorch comes from if there is no GPU (empty: use the build on PyPI).
#
# Works with Bash 3.2 (macOS).

use_python() {
    local requirements=$1 active=${PYTHON:-python3} venv=${VENV:-.venv} lacking='' checks=() index
    shift
    check_system
    if [ "${LOCKED:-}" = 1 ]; then
        # A separate folder, because pip checks what it installs, not what an earlier installation has left.
        requirements=${requirements%.txt}.lock venv=.venv-locked checks=(--require-hashes --only-binary :all:)
    elif lacking=$(lacking_modules "$active" "$@") && [ -z "$lacking" ]; then
        PYTHON=$active
        return
    fi
    PYTHON=$venv/bin/python
    # The copy of the lock is written last: if it differs or is missing, the lock has changed or an installation was interrupted.
    if [ "${DRY_RUN:-}" = 1 ] ||
        { has_modules "$PYTHON" "$@" && { [ "${LOCKED:-}" != 1 ] || cmp -s "$requirements" "$venv/$requirements"; }; }; then
        return
    fi
    if ! "$active" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        fail "'$active' is not Python 3.10 or newer. Install one, or set it: PYTHON=/path/to/python3 bash $0"
    fi
    if [ -n "$lacking" ] && [ -z "${VENV:-}" ] && [ ! -e "$venv" ] && [[ " $lacking " != *" torch "* ]]; then
        fail "$(command -v "$active") has PyTorch but lacks $lacking. Install the missing packages there:" \
            "$active -m pip install -r $requirements. Or install everything, with PyTorch, into $venv: VENV=$venv bash $0"
    fi
    make_environment
    if index=$(cpu_index); then
        echo "First use: installing the packages of $requirements into $venv ($("$active" --version 2>&1)), with the CPU build" \
            "of PyTorch because there is no GPU: about 1 GB, once. (VIT_TORCH_CPU_INDEX= installs the build for GPUs.)"
        # PyTorch from its own index first; the second command does not install it again.
        "$PYTHON" -m pip install --disable-pip-version-check --index-url "$index" $(grep -E '^torch(vision)?[<>=]' requirements.txt) ||
            echo "The CPU build could not be installed (see above); installing the build on PyPI, about 6 GB"
    else
        echo "First use: installing the packages of $requirements into $venv ($("$active" --version 2>&1)). PyTorch is large" \
            "(about 6 GB with its GPU libraries), so this takes some minutes, once."
    fi
    "$PYTHON" -m pip install --disable-pip-version-check ${checks[@]+"${checks[@]}"} -r "$requirements" ||
        fail "the installation failed (see above). Run the script again to continue it"
    has_modules "$PYTHON" "$@" || fail "the installed packages cannot be imported. Remove $venv and run the script again"
    [ "${LOCKED:-}" != 1 ] || cp "$requirements" "$venv/"
}

check_system() {
    case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*) fail "Windows itself is not supported. Use WSL 2 (wsl --install), and start the script there" ;;
    esac
    if [ -n "${TMPDIR:-}" ] && ! { [ -d "$TMPDIR" ] && [ -w "$TMPDIR" ]; }; then
        fail "TMPDIR=$TMPDIR: cannot write files there. Create the folder, set TMPDIR to another one, or unset it to use /tmp"
    fi
}

# Makes the environment `venv` with the Python `active` (variables of use_python), unless it has a pip already.
make_environment() {
    ! "$PYTHON" -m pip --version >/dev/null 2>&1 || return 0
    "$active" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "cannot make a virtual environment. Install Python's venv and pip (on Debian and Ubuntu: apt install python3-venv)"
    { mkdir -p "$venv" && [ -w "$venv" ]; } 2>/dev/null ||
        fail "cannot write to the folder $venv in $PWD. Make $PWD writable, or use another folder: VENV=/path/to/folder bash $0"
    # --clear, because a Python without its venv package leaves a folder without pip.
    "$active" -m venv --clear "$venv" || fail "making the virtual environment $venv failed (see above)"
}

# Prints the address of the index of PyTorch's CPU build, if this machine needs that build and the index answers.
cpu_index() {
    local index=${VIT_TORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu}
    [ "${LOCKED:-}" != 1 ] && [ -n "$index" ] && lacks_gpu || return 1
    "$active" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=5)' "$index" \
        2>/dev/null || return 1
    echo "$index"
}

# The number of GPUs that nvidia-smi lists.
listed_gpus() {
    local list=''
    ! command -v nvidia-smi >/dev/null || list=$(nvidia-smi -L 2>/dev/null) || list=''
    grep -c '^GPU' <<<"$list" || true
}

# Whether there can be no GPU: nvidia-smi lists none, and the device files of NVIDIA (of Jetson and Windows too) and AMD are missing.
# If nvidia-modprobe is installed, it makes these files when they are needed.
lacks_gpu() {
    local file
    [ "$(uname -s)" = Linux ] && [ "$(listed_gpus)" = 0 ] && ! command -v nvidia-modprobe >/dev/null || return 1
    for file in /dev/nvidia[0-9]* /dev/nvhost* /dev/nvmap /dev/dxg /dev/kfd /proc/driver/nvidia/gpus; do
        [ ! -e "$file" ] || return 1
    done
}

# Prints the modules that the Python lacks; fails if it is not Python 3.10 or newer. Does not import them, which would take seconds.
# A torch that is too old counts as lacking.
lacking_modules() {
    local python=$1
    shift
    "$python" - "$@" 2>/dev/null <<'PYTHON_CODE'
import importlib.metadata, importlib.util, sys
if sys.version_info < (3, 10):
    sys.exit(1)
lacking = [name for name in sys.argv[1:] if not importlib.util.find_spec(name)]
if "torch" not in lacking and tuple(map(int, importlib.metadata.version("torch").split(".")[:2])) < (2, 11):
    lacking.append("torch")
print(*lacking)
PYTHON_CODE
}

has_modules() {
    local lacking
    lacking=$(lacking_modules "$@") && [ -z "$lacking" ]
}

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}
