#!/usr/bin/env bash
# Make the virtual environment .venv from requirements.lock, then the system programs that are missing. Safe to repeat:
# what is in place stays, and a run that was cut off is made good by the next one.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.lock.sha256
lock=$(sha256sum requirements.lock | cut -d ' ' -f 1)

if [ ! -x .venv/bin/python ] || [ "$(cat "$stamp" 2>/dev/null)" != "$lock" ]; then
    uv=$(command -v uv || true)
    if [ -z "$uv" ]; then
        tools=.slipway/tools
        if [ ! -x "$tools/bin/uv" ]; then
            echo "setup: fetching uv, the installer"
            mkdir -p -m 700 .slipway
            python3 -m venv "$tools" || {
                echo "setup: python3 cannot make a virtual environment: sudo apt-get install python3-venv" >&2
                exit 2
            }
            "$tools/bin/pip" install --quiet --disable-pip-version-check 'uv>=0.8'
        fi
        uv=$tools/bin/uv
    fi
    echo "setup: installing the locked packages into .venv (about 2 GB)"
    [ -x .venv/bin/python ] || "$uv" venv --quiet --allow-existing --python 3.11 .venv
    # A folder of wheels that pip would look into serves uv too; elsewhere uv picks the build of torch for this machine:
    # CPU, or the CUDA that its driver speaks.
    if [ -n "${UV_FIND_LINKS:=${PIP_FIND_LINKS:-}}" ]; then
        export UV_FIND_LINKS
    else
        export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-auto}
    fi
    "$uv" pip install --quiet --python .venv/bin/python --compile-bytecode --requirement requirements.lock
    echo "$lock" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"
fi
exec .venv/bin/python -m slipway.platforms.local setup
