#!/usr/bin/env bash
# A real MLflow tracking server: SQLite, local artifacts. Runs in the foreground until Ctrl-C.
#   LCBENCH_MLFLOW_DIR             where its data lies (default: .mlflow in the repository)
#   LCBENCH_MLFLOW_HOST            the address it listens on (default: 127.0.0.1, this machine only; 0.0.0.0: every network)
#   LCBENCH_MLFLOW_PORT            (default: 5000)
#   LCBENCH_MLFLOW_ALLOWED_HOSTS   more names by which clients call it, beside this machine's own: a,b.example.org
#   LCBENCH_MLFLOW_PASSWORD_FILE   a file with the password of the account "admin", readable by you only: MLflow asks everybody
#                                  for an account then (needs: pip install -e '.[accounts]')
set -euo pipefail
umask 077

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${LCBENCH_MLFLOW_DIR:-$repository/.mlflow}
host=${LCBENCH_MLFLOW_HOST:-127.0.0.1}
port=${LCBENCH_MLFLOW_PORT:-5000}
password_file=${LCBENCH_MLFLOW_PASSWORD_FILE:-}

fail() { echo "mlflow.sh: $*" >&2; exit 1; }

mkdir -p "$folder"
# In a folder that others may write to, somebody else could have made it first.
[ -O "$folder" ] || fail "$folder belongs to $(stat -c %U "$folder"); choose another by LCBENCH_MLFLOW_DIR"
folder=$(cd "$folder" && pwd -P)

# MLflow answers only to names that it was told, so that no web page reaches it by a name of its own (DNS rebinding).
allowed=
set -f # names may be patterns
for name in localhost 127.0.0.1 '[::1]' "$host" "$(hostname)" "$(hostname -f 2>/dev/null || true)" \
    $(hostname -I 2>/dev/null || true) $(tr , " " <<<"${LCBENCH_MLFLOW_ALLOWED_HOSTS:-}"); do
    case $name in
    '' | 0.0.0.0 | ::) continue ;;
    \[*) ;;
    *:*:*) name="[$name]" ;; # IPv6
    esac
    case $name in
    \[*]:* | [!\[]*:*) allowed+=,$name ;; # with its port
    *) allowed+=,$name,${name/\[/[[]}:\* ;;         # at any port, since tunnels have others
    esac
done

export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
accounts=()
who="it has no accounts: whoever reaches this port may change and delete every run"
if [ -n "$password_file" ]; then
    [ -f "$password_file" ] && [ -O "$password_file" ] || fail "$password_file is no file of yours"
    case $(stat -Lc %a "$password_file") in *00) ;; *) fail "others may read $password_file: chmod 600 $password_file" ;; esac
    "$repository/.venv/bin/python" -c 'import flask_wtf' 2>/dev/null ||
        fail "accounts need Flask-WTF: $repository/.venv/bin/pip install -e '$repository[accounts]'"
    # MLflow takes its admin's password from the environment, at its first start; a command line could be read by all.
    MLFLOW_AUTH_ADMIN_PASSWORD=$(head -n 1 "$password_file")
    [ ${#MLFLOW_AUTH_ADMIN_PASSWORD} -ge 12 ] || fail "MLflow wants a password of at least 12 characters in $password_file"
    [ -s "$folder/flask.key" ] || head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$folder/flask.key"
    MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$folder/flask.key")
    # Everybody publishes into one experiment, so an account may edit what others publish. (default_permission)
    cat >"$folder/accounts.ini" <<INI
[mlflow]
default_permission = EDIT
database_uri = sqlite:///$folder/accounts.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
    export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_AUTH_CONFIG_PATH=$folder/accounts.ini
    accounts=(--app-name basic-auth)
    who="every account may change every run; admin makes accounts at http://$host:$port/signup"
fi

echo "MLflow on http://$host:$port  (Ctrl-C stops it)"
echo "  dashboards of lcbench: choose the experiment 'lcbench'; data in $folder"
echo "  $who"
case $host in
127.* | localhost | ::1) echo "  only this machine reaches it: LCBENCH_MLFLOW_HOST=0.0.0.0 opens it to its networks" ;;
esac
# One worker: SQLite has one writer, and uvicorn with more workers answers each request four times slower.
exec "$repository/.venv/bin/mlflow" server --workers 1 --host "$host" --port "$port" "${accounts[@]}" \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/mlartifacts" \
    --allowed-hosts "${allowed#,}"
