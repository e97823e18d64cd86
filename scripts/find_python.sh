#!/usr/bin/env bash
# Prints a Python to build the environment with: a 3.10, which every backend can have, else the
# newest there is. Every candidate is run, since a shim on PATH may exist and not work.
#   PYTHON=/path/to/python   skips the search
set -euo pipefail
home=${HOME:-/}

# runs PYTHON CONDITION: whether it starts, can make a virtual environment, and fits.
runs() {
    "$1" -c "import ensurepip, sys, venv; v = sys.version_info[:2]; sys.exit(not ($2))" \
        </dev/null >/dev/null 2>&1
}

# Every interpreter called python$1 that PATH, pyenv, uv or conda knows of.
candidates() {
    type -aP "python$1" || true
    printf '%s\n' "${PYENV_ROOT:-$home/.pyenv}"/versions/*/bin/"python$1"
    uv python find "$1" 2>/dev/null </dev/null || true
    printf '%s\n' "${CONDA_PREFIX:-/opt/conda}"/{,envs/*/}bin/"python$1"
    printf '%s\n' "$home"/{miniconda3,miniforge3,anaconda3}/{,envs/*/}bin/"python$1"
}

# first NAME CONDITION: the first candidate of that name that runs and fits.
first() {
    local python
    while read -r python; do
        if [[ -x $python ]] && runs "$python" "$2"; then
            echo "$python"
            return 0
        fi
    done < <(candidates "$1")
    return 1
}

if [[ -n ${PYTHON:-} ]]; then
    runs "$PYTHON" "v >= (3, 10)" && echo "$PYTHON" && exit 0
    echo "error: PYTHON=$PYTHON does not run, is older than 3.10, or lacks the venv module" >&2
    exit 2
fi
first 3.10 "v == (3, 10)" && exit 0
for minor in 14 13 12 11; do
    first "3.$minor" "v >= (3, 10)" && exit 0
done
first 3 "v >= (3, 10)" && exit 0
echo "error: found no Python 3.10 or newer that runs and has the venv module; install Python 3.10," \
    "for instance with: uv python install 3.10" >&2
exit 2
