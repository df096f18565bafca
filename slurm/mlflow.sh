#!/usr/bin/env bash
# A real MLflow tracking server: SQLite, local artifacts. Runs in the foreground until Ctrl-C.
#   LCBENCH_MLFLOW_DIR (default: .mlflow in the repository), LCBENCH_MLFLOW_HOST (127.0.0.1), LCBENCH_MLFLOW_PORT (5000)
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${LCBENCH_MLFLOW_DIR:-$repository/.mlflow}
host=${LCBENCH_MLFLOW_HOST:-127.0.0.1}
port=${LCBENCH_MLFLOW_PORT:-5000}
name=$(hostname)
mkdir -p "$folder"
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true

echo "MLflow on http://$host:$port  (Ctrl-C stops it)"
echo "  dashboards of lcbench: choose the experiment 'lcbench'; data in $folder"
# One worker: SQLite has one writer, and uvicorn with more workers answers each request four times slower.
exec "$repository/.venv/bin/mlflow" server --workers 1 --host "$host" --port "$port" \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/mlartifacts" \
    --allowed-hosts "localhost,localhost:*,127.0.0.1,127.0.0.1:*,$name,$name:$port"
