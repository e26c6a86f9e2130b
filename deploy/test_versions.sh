#!/usr/bin/env bash
# Run the quick tests under every installed Python that pd-proxy supports, each in a virtual environment of its own
# (.venv-3.12 and so on).
#
# usage: deploy/test_versions.sh [PYTEST ARGUMENT...]
#
# The script looks for an interpreter on the PATH, then among pyenv's. It names a version without one and skips it. The exit
# status is 0 only if the tests passed for every version that was found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# The versions that pyproject.toml names.
mapfile -t versions < <(sed -nE 's/^ *"Programming Language :: Python :: (3\.[0-9]+)",$/\1/p' pyproject.toml)
failed=()
tried=()

find_python() {
    local candidate
    for candidate in $(type -ap "python$1") "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        # pyenv has a shim for every version, and it works only for the selected versions.
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
