# Sourced by quickstart.sh, test.sh and references.sh: makes a virtual environment and installs a
# requirements file into it. What is there and up to date is left alone.
#
#   setup_environment DIRECTORY REQUIREMENTS
#
# Needs Python 3.11 or newer (PYTHON=... chooses one) and the network; no root. Debian and Ubuntu
# ship a Python that cannot make a whole environment without the package python3-venv: then pip
# comes from the system's own pip, or from the Debian package that holds its wheel.

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "No Python 3.11 or newer found${PYTHON:+ at PYTHON=$PYTHON}."
    say "Debian 12, Ubuntu 24.04 or newer: apt-get install python3 python3-venv."
    say "Elsewhere, name one: PYTHON=/path/to/python3.12 bash $0"
    return 1
}

# Debian's wheel of pip, unpacked without root from its package.
debian_pip() {
    local target=$1 scratch
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    scratch=$(mktemp -d)
    # Own lists, so that neither root nor an earlier `apt-get update` is needed; and no change of
    # user, for apt's own may not write to a private directory.
    mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
    local options=(-q -o "Dir::State::lists=$scratch/lists" -o "Dir::Cache=$scratch/cache"
        -o "APT::Sandbox::User=$(id -un)")
    local status=0
    (
        cd "$scratch" &&
            apt-get "${options[@]}" update &&
            apt-get "${options[@]}" download python3-pip-whl &&
            dpkg-deb -x python3-pip-whl_*.deb . &&
            mv usr/share/python-wheels/pip-*.whl pip.whl &&
            "$target/bin/python" pip.whl/pip install -q --ignore-installed pip
    ) >"$scratch/log" 2>&1 || status=$?
    [ $status = 0 ] || cat "$scratch/log" >&2
    rm -rf "$scratch"
    return $status
}

add_pip() {
    local python=$1 target=$2
    "$target/bin/python" -m pip --version >/dev/null 2>&1 && return
    if "$python" -c 'import ensurepip' 2>/dev/null &&
        "$target/bin/python" -m ensurepip --default-pip >/dev/null 2>&1; then
        return
    fi
    if "$python" -m pip --version >/dev/null 2>&1 &&
        "$python" -m pip --python "$target/bin/python" install -q pip; then
        return
    fi
    debian_pip "$(realpath "$target")" && return
    say "Could not put pip into $target. Install it and start again:"
    say "    apt-get install python3-venv     (Debian, Ubuntu; needs root)"
    return 1
}

setup_environment() {
    local target=$1 requirements=$2 python wanted
    # An environment that was moved, or whose Python has gone, cannot be mended.
    if [ -e "$target" ] && ! "$target/bin/python" -c 'import sys' 2>/dev/null; then
        [ ! -e "$target/pyvenv.cfg" ] || { say "$target does not run; making it anew"; rm -rf "$target"; }
    fi
    if [ ! -x "$target/bin/python" ]; then
        python=$(find_python) || return 1
        say "Making $target with $python"
        "$python" -m venv --without-pip "$target" || return 1
    else
        python=$target/bin/python
    fi
    wanted=$(sha256sum "$requirements" | cut -d ' ' -f 1)
    [ "$(cat "$target/.installed" 2>/dev/null)" != "$wanted" ] || return 0
    add_pip "$python" "$target" || return 1
    say "Installing $requirements into $target"
    "$target/bin/python" -m pip install -q --disable-pip-version-check -r "$requirements" || {
        say "Installing $requirements failed; started again, it goes on from what is there"
        return 1
    }
    # Last, so that an interrupted installation is taken up again.
    echo "$wanted" >"$target/.installed"
}
