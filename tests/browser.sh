#!/usr/bin/env bash
# A browser for the tests that look at pages: Debian's Chromium, where it is missing and this may install it. Else those tests skip.
set -euo pipefail
command -v chromium >/dev/null && exit
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no chromium, and only root on Debian can install it here: tests of pages will be skipped" >&2
    exit
fi
echo "installing chromium"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core; } >"$log" 2>&1; then
    tail -20 "$log" >&2
    echo "apt-get could not install chromium" >&2
    exit 1
fi
rm -f "$log"
