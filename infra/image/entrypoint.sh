#!/usr/bin/env bash
# What fedsam's image does: `head` and `site` become a node of a Ray cluster, `tracking` an MLflow server; anything else
# is run as it stands (so `docker run fedsam fedsam demo` works). Options after the role go to `ray start`.
#
#   NODE_IP      this machine's address                      HEAD_IP   the head's (site)
#   SITES        ids of the sites whose node this is, with commas between
#   GPUS         GPUs to offer                               MARKET, INSTANCE_TYPE   become labels
#   SECRETS      folder with ray-token and mlflow-password   DATA_DIR  for runs and, without DATABASE, MLflow's sqlite
#   PORTS        first of the 1,000 ports that Ray's processes use (20000): the firewall opens these
#   DATABASE     postgresql://USER@HOST/DB of MLflow; DATABASE_SECRET is the Secrets Manager id of its password
set -euo pipefail

fail() {
  echo "fedsam: $*" >&2
  exit 1
}

secret() { # FILE
  [ -r "${SECRETS:?}/$1" ] || fail "no secret at $SECRETS/$1"
  cat "$SECRETS/$1"
}

# {"site_A": 1, "site_B": 1} of A,B
resources() {
  local site list="" sites=${SITES:-}
  for site in ${sites//,/ }; do
    list+="${list:+, }\"site_$site\": 1"
  done
  printf '{%s}' "$list"
}

labels() {
  printf 'fedsam.io/role=%s' "$1"
  [ -z "${SITES:-}" ] || [[ "$SITES" == *,* ]] || printf ',fedsam.io/site=%s' "$SITES"
  [ -z "${MARKET:-}" ] || printf ',fedsam.io/market=%s' "$MARKET"
  [ -z "${INSTANCE_TYPE:-}" ] || printf ',fedsam.io/instance-type=%s' "$INSTANCE_TYPE"
}

role=${1:-}
case "$role" in
  head | site)
    shift
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${SECRETS:?}/ray-token" RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=20
    secret ray-token >/dev/null
    # The driver's runs log to MLflow as its admin; children of Ray inherit it.
    if [ -r "$SECRETS/mlflow-password" ]; then
      export MLFLOW_TRACKING_USERNAME=admin
      MLFLOW_TRACKING_PASSWORD=$(secret mlflow-password)
      export MLFLOW_TRACKING_PASSWORD
    fi
    first=${PORTS:-20000}
    options=(--block --disable-usage-stats "--node-ip-address=${NODE_IP:?}")
    options+=("--num-gpus=${GPUS:-0}" "--resources=$(resources)" "--labels=$(labels "$role")")
    options+=("--node-manager-port=$first" "--object-manager-port=$((first + 1))" "--runtime-env-agent-port=$((first + 2))")
    options+=("--dashboard-agent-grpc-port=$((first + 3))" "--dashboard-agent-listen-port=$((first + 4))")
    options+=("--metrics-export-port=$((first + 5))" "--min-worker-port=$((first + 10))" "--max-worker-port=$((first + 999))")
    if [ "$role" = head ]; then
      exec ray start --head --port=6379 --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port=8265 "${options[@]}" "$@"
    fi
    exec ray start "--address=${HEAD_IP:?}:6379" "${options[@]}" "$@"
    ;;
  tracking)
    shift
    folder="${DATA_DIR:?}/fedsam/mlflow"
    if [ -z "${DATABASE:-}" ]; then # on the head: sqlite, on the loopback only
      exec fedsam track serve --folder "$folder" "$@"
    fi
    MLFLOW_AUTH_ADMIN_PASSWORD=$(secret mlflow-password)
    export MLFLOW_AUTH_ADMIN_PASSWORD PGSSLMODE=require PGPASSFILE="${PGPASSFILE:-/tmp/pgpass}"
    # Secrets Manager gives the database a new password each week. libpq reads this file for every connection.
    password() {
      python - <<'PYTHON'
import json, os, boto3
found = boto3.client("secretsmanager").get_secret_value(SecretId=os.environ["DATABASE_SECRET"])["SecretString"]
word = json.loads(found)["password"].replace("\\", "\\\\").replace(":", "\\:")
os.umask(0o077)
with open(os.environ["PGPASSFILE"] + ".new", "w") as file:
    file.write(f"*:*:*:*:{word}\n")
os.replace(file.name, os.environ["PGPASSFILE"])
PYTHON
    }
    password || fail "the password of the database cannot be read from Secrets Manager"
    while sleep 60; do password || true; done &
    exec fedsam track serve --folder "$folder" --backend "$DATABASE" --artifacts "${ARTIFACTS:?}" --auth \
      --host 0.0.0.0 --allowed-hosts "${ALLOWED_HOSTS:?}" "$@"
    ;;
  "") fail "say what to be: head, site, tracking, or a command" ;;
  *) exec "$@" ;;
esac
