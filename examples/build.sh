#!/bin/sh
# sh examples/build.sh [OUT]: the runner, from the headers and libraries of Python's executorch package.
# CXX names another compiler, EXECUTORCH another unpacked package.
set -e
here=$(dirname "$0")
et=${EXECUTORCH:-$(${PYTHON:-python} -c 'import executorch; print(list(executorch.__path__)[0])')}
${CXX:-g++} -std=c++17 -O2 -Wno-deprecated-declarations -DC10_USING_CUSTOM_GENERATED_MACROS \
    -I"$et/include" -I"$et/include/executorch/runtime/core/portable_type/c10" "$here/runner.cpp" -o "${1:-$here/runner}" \
    -L"$et/lib" -lexecutorch -Wl,--no-as-needed -lexecutorch_backend_xnnpack -lexecutorch_kernels_optimized \
    -lexecutorch_kernels_quantized -lexecutorch_threadpool -Wl,-rpath,"$et/lib"
