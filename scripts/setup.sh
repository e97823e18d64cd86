#!/usr/bin/env bash
# Makes the environment that the Makefile's targets run in:
#   scripts/setup.sh VENV/STAMP CONSTRAINTS EXTRAS [BACKEND ...]
# Backends that the Python found cannot have are named and left out. The names of the others are
# written to the stamp file, last, so that the Makefile knows what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=$1 venv=${1%/*} constraints=$2 extras=$3
shift 3

# Not only whether the folder is there: an interrupted creation leaves one without pip.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(scripts/find_python.sh)
    echo "set-up: $("$python" --version) at $python"
    "$python" -m venv "$venv"
fi
python=$venv/bin/python

# The rule of what an interpreter can have is the package's own.
possible=$("$python" -c 'import runpy; print(*runpy.run_path("core/machine/environment.py")["possible"]())')
chosen=()
for name in "$@"; do
    case " $possible " in
    *" $name "*) chosen+=("$name") ;;
    *) echo "set-up: leaving out $name: $("$python" --version) on $(uname -sm) can have: $possible" ;;
    esac
done
if (($#)) && ! ((${#chosen[@]})); then
    echo "error: none of the backends asked for ($*) can be had; possible: $possible" >&2
    exit 2
fi

wanted=$(IFS=,; echo "${extras}${chosen[*]:+,${chosen[*]}}")
echo "set-up: installing triptych[$wanted] into $venv"
"$python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".[$wanted]"
echo "${chosen[*]:-none}" >"$stamp"
