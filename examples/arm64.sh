#!/bin/sh
# sh examples/arm64.sh WORK: builds the runner for 64-bit ARM Linux in the folder WORK, to be run by an emulator:
#     qemu-aarch64 -cpu cortex-a76 -L /usr/aarch64-linux-gnu WORK/runner FILE.pte NEW ID...
# Needs qemu-user and g++-aarch64-linux-gnu (Debian's names). The libraries come from PyPI's package for that processor.
set -e
version=$(${PYTHON:-python} -c 'from importlib.metadata import version; print(version("executorch"))')
tag=$(${PYTHON:-python} -c 'import sys; print("%d%d" % sys.version_info[:2])')
mkdir -p "$1"
${PYTHON:-python} -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: --python-version "$tag" \
    --implementation cp --abi "cp$tag" --platform manylinux_2_28_aarch64 --dest "$1" "executorch==$version"
${PYTHON:-python} -m zipfile -e "$1"/executorch-*.whl "$1"
CXX=aarch64-linux-gnu-g++ EXECUTORCH=$1/executorch sh "$(dirname "$0")/build.sh" "$1/runner"
