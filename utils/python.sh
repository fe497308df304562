# Sourced by train.sh, sweep.sh and test.sh from the project's folder: finds a Python that has what is needed, or makes one.
#
# use_python REQUIREMENTS MODULE...   sets PYTHON
#   The active python3 if it can import every MODULE; else .venv beside the scripts, made and filled from the file
#   REQUIREMENTS on first use. DRY_RUN=1 names .venv without making it. $PYTHON, if set, is where the search starts.
#   An active Python that has PyTorch and lacks something smaller is reported: PyTorch should not be installed twice unasked.
#   VENV names another folder than .venv, which is then made in any case.
#   LOCKED=1: only .venv-locked, filled from the .lock beside REQUIREMENTS: exact versions, wheels alone, hashes checked.
#   VIT_TORCH_CPU_INDEX: where the CPU build of PyTorch comes from if no GPU is seen (empty: take the build that PyPI has).
#
# Bash 3.2 (macOS) is enough.

use_python() {
    local requirements=$1 active=${PYTHON:-python3} venv=${VENV:-.venv} lacking='' checks=() index
    shift
    check_system
    if [ "${LOCKED:-}" = 1 ]; then
        # A folder of its own: pip checks what it installs, not what another installation has left.
        requirements=${requirements%.txt}.lock venv=.venv-locked checks=(--require-hashes --only-binary :all:)
    elif lacking=$(lacking_modules "$active" "$@") && [ -z "$lacking" ]; then
        PYTHON=$active
        return
    fi
    PYTHON=$venv/bin/python
    # The copy of the lock is written last: one that differs, or is missing, means another lock or half an installation.
    if [ "${DRY_RUN:-}" = 1 ] ||
        { has_modules "$PYTHON" "$@" && { [ "${LOCKED:-}" != 1 ] || cmp -s "$requirements" "$venv/$requirements"; }; }; then
        return
    fi
    if ! "$active" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        fail "Python 3.10 or newer is needed; '$active' is not: install one, or name it: PYTHON=/path/to/python3 bash $0"
    fi
    if [ -n "$lacking" ] && [ -z "${VENV:-}" ] && [ ! -e "$venv" ] && [[ " $lacking " != *" torch "* ]]; then
        fail "$(command -v "$active") has PyTorch but lacks $lacking. Install what is missing there:" \
            "$active -m pip install -r $requirements. Or have everything installed into $venv, PyTorch too: VENV=$venv bash $0"
    fi
    make_environment
    if index=$(cpu_index); then
        echo "First use: installing what $requirements lists into $venv ($("$active" --version 2>&1)), with the CPU build of" \
            "PyTorch, as no GPU is seen here: about 1 GB. It happens once. (VIT_TORCH_CPU_INDEX= takes the build for GPUs.)"
        # Its own index first: what is there already, the second command leaves alone.
        "$PYTHON" -m pip install --disable-pip-version-check --index-url "$index" $(grep -E '^torch(vision)?[<>=]' requirements.txt) ||
            echo "The CPU build could not be installed (the lines above say why): taking the one that PyPI has, about 6 GB"
    else
        echo "First use: installing what $requirements lists into $venv ($("$active" --version 2>&1)). PyTorch is large" \
            "(with its GPU libraries about 6 GB), so this takes some minutes; it happens once."
    fi
    "$PYTHON" -m pip install --disable-pip-version-check ${checks[@]+"${checks[@]}"} -r "$requirements" ||
        fail "installing failed (the lines above say why); run the script again to go on"
    has_modules "$PYTHON" "$@" || fail "the installed packages cannot be used: remove $venv and run the script again"
    [ "${LOCKED:-}" != 1 ] || cp "$requirements" "$venv/"
}

check_system() {
    case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*) fail "Windows itself is not supported. Use WSL 2 (wsl --install), and start the script there" ;;
    esac
    if [ -n "${TMPDIR:-}" ] && ! { [ -d "$TMPDIR" ] && [ -w "$TMPDIR" ]; }; then
        fail "TMPDIR=$TMPDIR: no file can be made there. Make that folder, name another, or unset TMPDIR to take /tmp"
    fi
}

# Makes `venv` with `active`, the variables of use_python, unless it has a pip already.
make_environment() {
    ! "$PYTHON" -m pip --version >/dev/null 2>&1 || return 0
    "$active" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "cannot make a virtual environment: install Python's venv and pip (on Debian and Ubuntu: apt install python3-venv)"
    { mkdir -p "$venv" && [ -w "$venv" ]; } 2>/dev/null ||
        fail "the folder $venv cannot be made in $PWD, or not be written: make $PWD writable, or name another place:" \
            "VENV=/path/to/folder bash $0"
    # A folder without pip is what a Python without its venv package leaves behind.
    "$active" -m venv --clear "$venv" || fail "making the virtual environment $venv failed (the lines above say why)"
}

# Prints the address of the index that has PyTorch's CPU build, if that is what this machine wants and the index answers.
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

# Whether no GPU can be here: nvidia-smi lists none, and none of the files is there through which PyTorch would reach one of NVIDIA
# (a Jetson's and Windows' too) or AMD. Where nvidia-modprobe is installed, it makes them when they are needed.
lacks_gpu() {
    local file
    [ "$(uname -s)" = Linux ] && [ "$(listed_gpus)" = 0 ] && ! command -v nvidia-modprobe >/dev/null || return 1
    for file in /dev/nvidia[0-9]* /dev/nvhost* /dev/nvmap /dev/dxg /dev/kfd /proc/driver/nvidia/gpus; do
        [ ! -e "$file" ] || return 1
    done
}

# Prints the modules that the Python lacks; fails where it is no Python of 3.10 or newer. Finds them without importing them, which
# would take seconds. A torch that is too old is lacking.
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
