#!/usr/bin/env bash
# Runs the tests in the project's own environment, which it builds if need be.
#
#   bash launchers/test.sh                      everything but what takes many minutes
#   bash launchers/test.sh -m long              that: every plan to every plan
#   bash launchers/test.sh -m 'not slow' -x     arguments go to pytest
#
#   DIST_REC_RAW       folder with the raw public data sets; default ../shared/data. Tests that need it say so.
#   OMP_NUM_THREADS    default 1: several ranks share the cores, and another number gives other last digits

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export DIST_REC_RAW="${DIST_REC_RAW:-$(cd .. && pwd)/shared/data}"
exec .venv/bin/python -m pytest -q "$@"
