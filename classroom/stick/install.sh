#!/bin/sh
for name in python3.11 python3.12 python3.13 python3 python; do "$name" -c '' 2>/dev/null && exec "$name" "$(dirname "$0")/install.py" "$@"; done; echo "Python was not found; README.txt says which one is needed."; exit 1
