#!/usr/bin/env bash
# Make the virtual environment that the Makefile installs into, unless it exists and works.
#
# usage: PYTHON=python3.11 deploy/venv.sh VENV
#
# Without PYTHON, the first python3 on the PATH is used. If that was built without optimisations (as pyenv does by default),
# another one on the PATH that was built with them is used instead: the gateway needs an eighth less CPU with it.
#
# Debian and Ubuntu have ensurepip, which puts pip into a virtual environment, in a separate package. As root this script
# installs that package; otherwise it prints the command.
set -euo pipefail

python=${PYTHON:-python3}
venv=${1:?usage: $0 VENV}
# Distributions optimise their Python in ways that CONFIG_ARGS does not show.
readonly UNOPTIMISED='import sys, sysconfig
how = sysconfig.get_config_var("CONFIG_ARGS")
sys.exit(sys.base_prefix == "/usr" or not how or "--enable-optimizations" in how)'
readonly USABLE='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'

fail() { printf '%s\n' "$@" >&2; exit 1; }

"$venv/bin/python" -m pip --version >/dev/null 2>&1 && exit 0

if [ -z "${PYTHON:-}" ] && python3 -c "$UNOPTIMISED" 2>/dev/null; then
    mapfile -t others < <(type -ap python3)
    for other in "${others[@]}"; do
        if "$other" -c "$USABLE" 2>/dev/null && ! "$other" -c "$UNOPTIMISED"; then
            python=$other
            echo "$(command -v python3) was built without optimisations, so $other is taken (PYTHON=python3 takes the first)"
            break
        fi
    done
fi
command -v "$python" >/dev/null ||
    fail "No $python found. pd-proxy needs Python 3.11 or newer; name yours with: make PYTHON=/path/to/python3 ..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is Python $version and pd-proxy needs 3.11 or newer; name another with: make PYTHON=python3.11 ..."

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package=python$version-venv
    line="apt-get install -y --no-install-recommends $package"
    command -v apt-get >/dev/null || fail "$python has no ensurepip: install what gives its venv module, then try again."
    [ "$(id -u)" = 0 ] || fail "$python cannot make virtual environments: Debian keeps that in $package. Type:" "  sudo $line"
    echo "installing $package, which Debian keeps apart from Python"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && $line -qq </dev/null >/dev/null; } || fail "That did not work. Try it by hand:" "  $line"
fi

"$python" -m venv --clear "$venv"
echo "made $venv with Python $version"
