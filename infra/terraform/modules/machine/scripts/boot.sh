# The first boot of a machine: reads its secrets, checks its GPUs, and starts fedsam's image, which starts Ray
# (infra/image/entrypoint.sh). Terraform puts the settings before it as environment. What it prints is in
# /var/log/cloud-init-output.log; secrets are not.
# shellcheck shell=bash disable=SC2154  # the settings stand before this text
set -euo pipefail

say() { echo "fedsam: $*"; }
fail() {
  say "$*" >&2
  exit 1
}

# The machine's rights and its way out may be some seconds behind the machine itself.
patiently() {
  local tries=${BOOT_TRIES:-30}
  until "$@"; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || fail "gave up: $1 $2 $3"
    sleep 5
  done
}

parameter() { # NAME-OR-ARN FILE
  (
    umask 077
    aws ssm get-parameter --region "$REGION" --with-decryption --name "$1" --query Parameter.Value --output text >"$2.new" &&
      mv "$2.new" "$2"
  )
}

metadata() { # PATH
  local session
  session=$(curl -sf --retry 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)
  curl -sf --retry 5 -H "X-aws-ec2-metadata-token: $session" "http://169.254.169.254/latest/meta-data/$1"
}

# Fewer GPUs than promised: a site that trains on its CPUs would hold up all the others.
gpus=()
if [ "$GPU_COUNT" -gt 0 ]; then
  found=$(nvidia-smi --list-gpus | wc -l)
  [ "$found" -ge "$GPU_COUNT" ] || fail "this machine is to have $GPU_COUNT GPU(s), nvidia-smi lists $found: choose another instance_type, or lower gpus"
  gpus=(--gpus all)
fi

user=${CONTAINER_UID:-10001} # of the image
folder="$DATA_DIR/secrets"
mkdir -p "$DATA_DIR/fedsam" "$DATA_DIR/scans" "$folder"
chmod 700 "$folder"
for secret in $SECRETS; do # FILE=ARN
  patiently parameter "${secret#*=}" "$folder/${secret%%=*}"
done
# Scans that the hospital uploads later are there some minutes after.
if [ -n "${SCANS_URL:-}" ]; then
  patiently aws s3 sync --region "$REGION" --only-show-errors "$SCANS_URL" "$DATA_DIR/scans"
  again="aws s3 sync --region $REGION --only-show-errors $SCANS_URL $DATA_DIR/scans && chown -R $user $DATA_DIR/scans"
  printf 'PATH=%s\n*/10 * * * * root %s\n' "$PATH" "$again" >"${CRON_DIR:-/etc/cron.d}/fedsam-scans"
fi
chown -R "$user" "$DATA_DIR/fedsam" "$DATA_DIR/scans" "$folder"

registry=${IMAGE%%/*}
case "$registry" in
  *.dkr.ecr.*) # a login is of one region: the registry's, which need not be the machine's
    home=${registry#*.dkr.ecr.}
    aws ecr get-login-password --region "${home%%.*}" | docker login --username AWS --password-stdin "$registry"
    ;;
esac
patiently docker pull --quiet "$IMAGE"

# What the containers are told. Secrets are files that they read, so that `docker inspect` shows none.
settings="$folder/settings"
{
  echo "NODE_IP=$(metadata local-ipv4)"
  echo "INSTANCE_TYPE=$(metadata instance-type)"
  echo "SECRETS=$folder"
  echo "GPUS=$GPU_COUNT"
  echo "AWS_DEFAULT_REGION=$REGION"
  for name in DATA_DIR HEAD_IP SITES MARKET DATABASE DATABASE_SECRET ARTIFACTS ALLOWED_HOSTS; do
    [ -z "${!name:-}" ] || echo "$name=${!name}"
  done
} >"$settings"

run() { # NAME ROLE OPTION...
  docker run --detach --name "$1" --restart unless-stopped --network host --ipc host --user "$user" \
    --volume "$DATA_DIR:$DATA_DIR" --env-file "$settings" "${@:3}" "$IMAGE" "$2"
}

run fedsam "$ROLE" ${gpus[@]+"${gpus[@]}"}
if [ "${TRACKING_HERE:-}" = true ]; then
  run fedsam-tracking tracking
fi
say "started $ROLE"
