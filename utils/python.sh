# Sourced by train.sh and test.sh from the project's folder: finds a Python that has what is needed, or makes one.
#
# use_python REQUIREMENTS MODULE...   sets PYTHON
#   The active python3 if it can import every MODULE; else .venv beside the scripts, made and filled from the file
#   REQUIREMENTS on first use. DRY_RUN=1 names .venv without making it. $PYTHON, if set, is where the search starts.
#   VENV names another folder than .venv.
#   LOCKED=1: only .venv-locked, filled from the .lock beside REQUIREMENTS: exact versions, wheels alone, hashes checked.
#
# Bash 3.2 (macOS) is enough.

use_python() {
    local requirements=$1 active=${PYTHON:-python3} venv=${VENV:-.venv} checks=()
    shift
    if [ "${LOCKED:-}" = 1 ]; then
        # A folder of its own: pip checks what it installs, not what another installation has left.
        requirements=${requirements%.txt}.lock venv=.venv-locked checks=(--require-hashes --only-binary :all:)
    elif has_modules "$active" "$@"; then
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
    echo "First use: installing what $requirements lists into $venv ($("$active" --version 2>&1)). PyTorch is large" \
        "(with its GPU libraries a few GB), so this takes some minutes; it happens once."
    # A folder without pip is what a Python without its venv package leaves behind.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$active" -m venv --clear "$venv" ||
        fail "cannot make a virtual environment: install Python's venv and pip (on Debian and Ubuntu: apt install python3-venv)"
    "$PYTHON" -m pip install --disable-pip-version-check --quiet ${checks[@]+"${checks[@]}"} -r "$requirements" ||
        fail "installing failed (the lines above say why); run the script again to go on"
    has_modules "$PYTHON" "$@" || fail "the installed packages cannot be used: remove $venv and run the script again"
    [ "${LOCKED:-}" != 1 ] || cp "$requirements" "$venv/"
}

# Finds the modules without importing them, which would take seconds, and compares the version of torch.
has_modules() {
    local python=$1
    shift
    "$python" - "$@" 2>/dev/null <<'PYTHON_CODE'
import importlib.metadata, importlib.util, sys
if sys.version_info < (3, 10) or not all(importlib.util.find_spec(name) for name in sys.argv[1:]):
    sys.exit(1)
if tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2]) < (2, 11):
    sys.exit(1)
PYTHON_CODE
}

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}
