#!/usr/bin/env bash
# Run the quick tests under every Python that pd-proxy supports and that is found here, each in a virtual environment of
# its own (.venv-3.12 and so on).
#
# usage: deploy/test_versions.sh [PYTEST ARGUMENT...]
#
# An interpreter is looked for on the PATH, then among pyenv's. A version without one is named and left out. The exit
# status is 0 only if every version that was found is good.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Those that pyproject.toml names.
mapfile -t versions < <(sed -nE 's/^ *"Programming Language :: Python :: (3\.[0-9]+)",$/\1/p' pyproject.toml)
failed=()
tried=()

find_python() {
    local candidate
    for candidate in $(type -ap "python$1") "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        # A shim of pyenv is there for every version, and works for those that are chosen.
        if "$candidate" -c "import ensurepip, sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

for version in "${versions[@]}"; do
    python=$(find_python "$version")
    if [ -z "$python" ]; then
        echo "Python $version is not here, so it is not tested"
        continue
    fi
    venv=.venv-$version
    pip=("$venv/bin/python" -m pip --disable-pip-version-check install -q -c constraints.txt)
    printf '\n=== Python %s (%s)\n' "$version" "$python"
    if PYTHON=$python deploy/venv.sh "$venv" && "${pip[@]}" setuptools &&
        "${pip[@]}" --no-build-isolation -e '.[test,dev]' &&
        "$venv/bin/pytest" -n auto --dist loadgroup -p no:schemathesis -m "not real and not slow" "$@"; then
        tried+=("$version")
    else
        failed+=("$version")
    fi
done
printf '\ngood: %s\n' "${tried[*]:-none}"
[ ${#failed[@]} -eq 0 ] || { printf 'FAILED: %s\n' "${failed[*]}"; exit 1; }
