#!/usr/bin/env bash
# Write constraints.txt again, with the newest versions that pyproject.toml allows and that install together into an empty
# virtual environment.
#
# usage: PYTHON=python3 deploy/constraints.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install -q --upgrade setuptools
"${pip[@]}" install -q --no-build-isolation -e '.[test,dev]'
{
    echo "# Exact versions of all that the virtual environment holds for running, testing and developing pd-proxy."
    echo "# Used with pip's -c by the Makefile, the Dockerfile and CI. Written by \`make constraints\`; do not edit."
    # Freezing leaves setuptools out where it came with Python, and the build needs it.
    { "${pip[@]}" freeze --exclude-editable; "${pip[@]}" freeze --all | grep '^setuptools=='; } | LC_ALL=C sort -fu
} >"$work/constraints.txt"
if grep -nE '@|://|--hash|^-e' "$work/constraints.txt"; then
    echo "constraints.sh: the lines above are no plain versions; constraints.txt is unchanged" >&2
    exit 1
fi
mv "$work/constraints.txt" constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) packages"
