#!/usr/bin/env bash
# dev_cluster.sh - a real, throw-away Slurm cluster on one Debian or Ubuntu machine, for tests and first steps.
# Needs root with CAP_SYS_ADMIN and CAP_NET_ADMIN; no docker, no systemd. Several clusters can be up side by side.
#
#   dev_cluster.sh up [N]         bring up N nodes (default 3, at most 8); nothing to do if they are up already
#   dev_cluster.sh down           end every job and daemon, remove namespaces and links; the logs stay
#   dev_cluster.sh status         what is up; exit status 0 only if the controller answers and all nodes are up
#   dev_cluster.sh env            print `export SLURM_CONF=...`       ->  eval "$(dev_cluster.sh env)"
#   dev_cluster.sh power-off X    pull the plug of node X: slurmd and tasks die at once, nobody is told
#   dev_cluster.sh power-on X     boot node X again
#   dev_cluster.sh kill-slurmd X  crash only the slurmd of node X; its running steps live on
#   dev_cluster.sh cut X          unplug the network cable of node X
#   dev_cluster.sh heal X         plug it in again
#   dev_cluster.sh bytes          bytes that every node has sent and received since `up`
#   dev_cluster.sh exec X CMD...  run CMD on node X, outside any job
#
# A node has its own network, PID, UTS and mount namespace: own address on a bridge, own host name, /etc/hosts and
# process tree. Settings (environment), read by `up`, DEV_CLUSTER_DIR by every command:
#   DEV_CLUSTER_DIR    state, logs, sockets (default /tmp/biroute-cluster). Short (unix sockets: < 108 characters) and
#                      readable for user munge
#   DEV_CLUSTER_CPUS   CPUs per node (default 8, whatever the hardware has)
#   DEV_CLUSTER_GPUS   fake GPUs per node (default 0): jobs get CUDA_VISIBLE_DEVICES, nothing computes
#   DEV_CLUSTER_ACCT   1: MariaDB and slurmdbd as well, so that sacct works (default 0)
#   DEV_CLUSTER_OWNER  a process id: when that process is gone, the cluster goes down by itself
# Exit status of `up`: 1 something failed, 3 this machine cannot have such a cluster (root, capabilities, packages).
set -euo pipefail

DIR=${DEV_CLUSTER_DIR:-/tmp/biroute-cluster}
MAX_NODES=8
export SLURM_CONF=$DIR/slurm.conf

say() { echo "dev_cluster.sh: $*" >&2; }
die() { say "$*"; exit 1; }
not_here() { say "$*"; exit 3; } # this machine cannot have a cluster
wait_for() { # wait_for SECONDS WHAT CMD...   until CMD succeeds
    local tries=$(($1 * 10)) what=$2; shift 2
    until "$@" >/dev/null 2>&1; do
        tries=$((tries - 1)); [ "$tries" -gt 0 ] || { say "timeout: $what"; return 1; }
        sleep 0.1
    done
}
# A zombie counts as dead: daemons are orphans, and pid 1 of a container may take seconds to reap them.
dead() { ! grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status"; }
pid_is() { [ -n "${1:-}" ] && ! dead "$1" && [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ]; } # pid_is PID COMM
stop_pidfile() { # stop_pidfile FILE COMM   TERM, then KILL after 10 s; only if the process still is that program
    local pid; pid=$(cat "$1" 2>/dev/null) || return 0
    if pid_is "$pid" "$2"; then
        kill "$pid" 2>/dev/null || true
        wait_for 10 "$2 to stop" dead "$pid" || kill -9 "$pid" 2>/dev/null || true
    fi
    rm -f "$1"
}
load() { # NODES CPUS GPUS ACCT ID
    [ -f "$DIR/params" ] || die "no cluster in $DIR (bring one up: $0 up)"
    # shellcheck disable=SC1091
    . "$DIR/params"
    name_things
}
name_things() { # everything that must differ between two clusters of one machine follows from ID
    NET=10.77.$ID # controller and login host .1, node i .(10 + i)
    BRIDGE=brc$ID CONTROLLER_PORT=$((17000 + ID)) DBD_PORT=$((17300 + ID)) SQL_PORT=$((17600 + ID))
}
nodes() { seq -f 'node%g' 1 "$NODES"; }
check_node() { nodes | grep -qx -- "${1:-}" || die "no such node: '${1:-}'"; }
namespace() { echo "brc$ID-$1"; }
cable() { echo "brc$ID-${1#node}"; } # the host's end; the other end is eth0 of the node

install_packages() {
    local wanted=(slurmctld slurmd slurm-client munge iproute2 util-linux) missing=() package
    if [ "$ACCT" = 1 ]; then wanted+=(slurmdbd mariadb-server-core mariadb-client-core); fi
    for package in "${wanted[@]}"; do
        dpkg -s "$package" 2>/dev/null | grep -q '^Status: install ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || not_here "missing ${missing[*]}, and there is no apt-get"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends)
    { "${apt[@]}" "${missing[@]}" || { apt-get update && "${apt[@]}" "${missing[@]}"; }; } >"$DIR/log/apt.log" 2>&1 ||
        { tail -5 "$DIR/log/apt.log" >&2; not_here "apt-get cannot install ${missing[*]}, see $DIR/log/apt.log"; }
}

write_config() {
    local i gres=""
    if [ "$GPUS" -gt 0 ]; then gres="Gres=gpu:$GPUS"; fi
    cat >"$SLURM_CONF" <<E
ClusterName=dev$ID
SlurmctldHost=$(hostname -s)($NET.1)
SlurmctldPort=$CONTROLLER_PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (Slurm's default: 120 s)
AuthInfo=socket=$DIR/munge/munge.socket,cred_expire=10
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/metrics_log/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
MpiDefault=none
# no cgroups needed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# believe the numbers of CPUs and the memory below rather than the hardware
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=8000
# a step that takes more memory than its job asked for is killed, as cgroups do it elsewhere
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
GresTypes=gpu
# quick reactions, for tests (Slurm's defaults: SlurmdTimeout 300, KillWait 30, ...)
SlurmdTimeout=10
SlurmctldTimeout=10
BatchStartTimeout=10
KillWait=3
MessageTimeout=10
TCPTimeout=2
UnkillableStepTimeout=30
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,bf_resolution=60,batch_sched_delay=1
# partition "high" preempts "main": the job gets its --signal, GraceTime to leave, then is requeued
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
E
    if [ "$ACCT" = 1 ]; then cat >>"$SLURM_CONF" <<E; fi
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$DBD_PORT
# not a password: the munge socket for talking to slurmdbd
AccountingStoragePass=$DIR/munge/munge.socket
E
    for i in $(seq 1 "$NODES"); do
        echo "NodeName=node$i NodeAddr=$NET.$((10 + i)) CPUs=$CPUS RealMemory=1000000 $gres State=UNKNOWN"
    done >>"$SLURM_CONF"
    cat >>"$SLURM_CONF" <<E
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=15 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
E
    # No cgroup is used, but slurmd loads a cgroup plugin all the same and exits where it cannot detect one, as below
    # the /sys of a network namespace; cgroup/v2 would want systemd.
    echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf"
    # Fake GPUs must be character devices, each its own: made with the device number of /dev/null.
    : >"$DIR/gres.conf"
    for i in $(seq 0 $((GPUS - 1))); do
        mknod "$DIR/dev/gpu$i" c 1 3
        echo "NodeName=node[1-$NODES] Name=gpu File=$DIR/dev/gpu$i" >>"$DIR/gres.conf"
    done
}

claim_network() { # the first ID whose bridge could be created: that decides between clusters that start together
    for ID in $(seq 1 250); do
        name_things
        ip link show "$BRIDGE" >/dev/null 2>&1 && continue
        [ -z "$(ss -Hltn "( sport = :$CONTROLLER_PORT or sport = :$DBD_PORT or sport = :$SQL_PORT )")" ] || continue
        ip link add "$BRIDGE" type bridge 2>"$DIR/log/bridge.log" && return 0
        grep -q "File exists" "$DIR/log/bridge.log" || not_here "no bridge can be made here (CAP_NET_ADMIN?): $(cat "$DIR/log/bridge.log")"
    done
    die "no free network between 10.77.1.0 and 10.77.250.0"
}
network_up() {
    local i node space hosts
    ip addr add "$NET.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    hosts=$(echo "127.0.0.1 localhost"; echo "$NET.1 $(hostname -s)"
        for i in $(seq 1 "$NODES"); do echo "$NET.$((10 + i)) node$i"; echo "::ffff:$NET.$((10 + i)) node$i"; done)
    for i in $(seq 1 "$NODES"); do
        node=node$i space=$(namespace "node$i")
        mkdir -p "/etc/netns/$space" # `ip netns exec` mounts these over /etc/hosts and /etc/resolv.conf
        echo "$hosts" >"/etc/netns/$space/hosts"
        : >"/etc/netns/$space/resolv.conf" # no DNS in there: fail at once instead of timing out
        ip netns add "$space"
        ip netns exec "$space" sh -c 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6' 2>/dev/null || true
        ip -n "$space" link set lo up
        ip link add "$(cable "$node")" type veth peer name eth0 netns "$space"
        ip link set "$(cable "$node")" master "$BRIDGE" up
        ip -n "$space" addr add "$NET.$((10 + i))/24" dev eth0
        ip -n "$space" link set eth0 up
    done
}
network_down() {
    local node space pid
    for node in $(nodes); do
        space=$(namespace "$node")
        if [ -e "/run/netns/$space" ]; then
            for pid in $(ip netns pids "$space"); do kill -9 "$pid" 2>/dev/null || true; done
            ip netns del "$space" 2>/dev/null || true
        fi
        ip link del "$(cable "$node")" 2>/dev/null || true
        rm -rf "/etc/netns/$space"
    done
    ip link del "$BRIDGE" 2>/dev/null || true
    rmdir /etc/netns 2>/dev/null || true
}

# A node is a small container. Its init (pid 1 of the PID namespace) is a bash that only reaps; killing it kills all.
start_node() {
    mkdir -p "$DIR/metrics_log/$1"
    setsid ip netns exec "$(namespace "$1")" unshare --uts --pid --fork --kill-child --mount-proc bash -c '
        hostname "$1"; slurmd -N "$1" -f "$2"
        while :; do sleep 3600 & wait $!; done' node-init "$1" "$SLURM_CONF" \
        </dev/null >"$DIR/log/init-$1.log" 2>&1 &
    echo $! >"$DIR/run/unshare-$1.pid"
}
init_pid() { # of a node's init, as seen from here
    local pid; pid=$(cat "$DIR/run/unshare-$1.pid" 2>/dev/null) && pid_is "$pid" unshare &&
        tr -d ' ' <"/proc/$pid/task/$pid/children"
}
in_node() {
    local node=$1 pid; shift
    pid=$(init_pid "$node") && [ -n "$pid" ] || { say "$node is off"; return 1; }
    nsenter -t "$pid" -m -u -n -p -- "$@"
}
stop_node() { # at once and with everything that runs on it
    local pid init
    pid=$(cat "$DIR/run/unshare-$1.pid" 2>/dev/null || true)
    if pid_is "$pid" unshare; then
        init=$(init_pid "$1" || true)
        kill -9 ${init:+"$init"} "$pid" 2>/dev/null || true
        [ -z "$init" ] || wait_for 10 "$1 to die" dead "$init" || true
    fi
    rm -f "$DIR/run/unshare-$1.pid" "$DIR/run/slurmd-$1.pid"
}

start_munge() {
    install -d -o munge -g munge -m 755 "$DIR/munge"
    (umask 077; head -c 128 /dev/urandom >"$DIR/munge/key"); chown munge:munge "$DIR/munge/key"
    setpriv --reuid=munge --regid=munge --clear-groups munged --key-file="$DIR/munge/key" \
        --socket="$DIR/munge/munge.socket" --pid-file="$DIR/munge/munged.pid" \
        --log-file="$DIR/munge/munged.log" --seed-file="$DIR/munge/seed"
    wait_for 10 munged munge -S "$DIR/munge/munge.socket" -n
}
start_accounting() {
    local sql=(mariadb --no-defaults -S "$DIR/mysql/sock")
    mkdir -p "$DIR/mysql"
    mariadb-install-db --no-defaults --user=root --datadir="$DIR/mysql" --skip-test-db \
        --auth-root-authentication-method=normal >"$DIR/log/mysql-install.log" 2>&1
    setsid mariadbd --no-defaults --user=root --datadir="$DIR/mysql" --bind-address=127.0.0.1 --port="$SQL_PORT" \
        --socket="$DIR/mysql/sock" --pid-file="$DIR/mysql/pid" --innodb-lock-wait-timeout=900 \
        --innodb-flush-log-at-trx-commit=0 --innodb-buffer-pool-size=64M </dev/null >"$DIR/log/mysql.log" 2>&1 &
    wait_for 60 MariaDB "${sql[@]}" -e "SELECT 1"
    "${sql[@]}" -e "CREATE DATABASE slurm; CREATE USER slurm@'%' IDENTIFIED BY 'dev'; GRANT ALL ON slurm.* TO slurm@'%'"
    (umask 077; cat >"$DIR/slurmdbd.conf") <<E
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$DBD_PORT
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$SQL_PORT
StorageUser=slurm
StoragePass=dev
StorageLoc=slurm
PidFile=$DIR/run/slurmdbd.pid
LogFile=$DIR/log/slurmdbd.log
E
    slurmdbd
    wait_for 60 slurmdbd timeout 5 sacctmgr -n list cluster
    timeout 20 sacctmgr -i add cluster "dev$ID" >/dev/null
}
start_watcher() { # so that a killed owner leaves nothing behind
    setsid bash -c "$(declare -f dead)"'; until dead "$1"; do sleep 1; done; exec "$2" down' \
        cluster-watcher "$OWNER" "$(realpath "$0")" </dev/null >"$DIR/log/watcher.log" 2>&1 &
    echo $! >"$DIR/run/watcher.pid"
}

reachable() { [ -d "/sys/class/net/$BRIDGE" ] && timeout 10 scontrol ping; } # no bridge: packets would go elsewhere
healthy() {
    reachable >/dev/null 2>&1 &&
        [ "$(sinfo -h -N -p main -t idle,mixed,allocated,completing -o %N 2>/dev/null | sort -u | wc -l)" = "$NODES" ]
}

up() {
    [ "$(id -u)" = 0 ] || not_here "needs root"
    unshare --net --uts --pid --mount --fork true 2>/dev/null || not_here "needs CAP_SYS_ADMIN for namespaces"
    NODES=${1:-3} CPUS=${DEV_CLUSTER_CPUS:-8} GPUS=${DEV_CLUSTER_GPUS:-0} ACCT=${DEV_CLUSTER_ACCT:-0}
    OWNER=${DEV_CLUSTER_OWNER:-}
    [[ $NODES =~ ^[0-9]+$ ]] && [ "$NODES" -ge 1 ] && [ "$NODES" -le $MAX_NODES ] || die "1 to $MAX_NODES nodes"
    local wanted="NODES=$NODES CPUS=$CPUS GPUS=$GPUS ACCT=$ACCT" node
    if grep -qsx "$wanted" "$DIR/params" && (load; healthy); then say "already up"; status; return; fi
    (down) # of whatever is there, with its own settings
    rm -rf "$DIR"
    mkdir -p "$DIR"/{state,metrics_log,log,run,dev}
    chmod 755 "$DIR"
    install_packages
    claim_network
    printf '%s\nID=%s\n' "$wanted" "$ID" >"$DIR/params"
    if [ -n "$OWNER" ]; then start_watcher; fi
    write_config
    start_munge
    if [ "$ACCT" = 1 ]; then start_accounting; fi
    network_up
    slurmctld -c -f "$SLURM_CONF"
    for node in $(nodes); do start_node "$node"; done
    wait_for 60 "all nodes up" healthy || { status || true; die "not healthy, see $DIR/log"; }
    status
}

down() {
    [ -f "$DIR/params" ] || return 0
    load
    stop_pidfile "$DIR/run/slurmctld.pid" slurmctld # before its nodes, or it lingers to talk to them
    local node
    for node in $(nodes); do stop_node "$node"; done
    stop_pidfile "$DIR/run/slurmdbd.pid" slurmdbd
    stop_pidfile "$DIR/mysql/pid" mariadbd
    stop_pidfile "$DIR/munge/munged.pid" munged
    network_down
    rm -f "$DIR/params"
    stop_pidfile "$DIR/run/watcher.pid" bash # last: the watcher itself may be running this
}

status() {
    load
    echo "nodes=$NODES cpus=$CPUS gpus=$GPUS acct=$ACCT network=$NET.0/24 dir=$DIR"
    echo "export SLURM_CONF=$SLURM_CONF"
    reachable || return 1
    timeout 20 sinfo -N -p main -o '%8N %12T %5c %8m %10G %E' || true
    healthy
}

command=${1:-}; shift || true
case $command in
    up) up "$@" ;;
    down) down ;;
    status) status ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    power-off) load; check_node "${1:-}" # cable first: a machine without power sends no FIN or RST either
        ip link set "$(cable "$1")" down
        stop_node "$1" ;;
    power-on) load; check_node "${1:-}"
        ip link set "$(cable "$1")" up
        start_node "$1" ;;
    kill-slurmd) load; check_node "${1:-}"; in_node "$1" kill -9 "$(cat "$DIR/run/slurmd-$1.pid")" ;;
    cut) load; check_node "${1:-}"; ip link set "$(cable "$1")" down ;;
    heal) load; check_node "${1:-}"; ip link set "$(cable "$1")" up ;;
    bytes) load # at the host's end of the cable: what it received is what the node sent
        for node in $(nodes); do
            counters=/sys/class/net/$(cable "$node")/statistics
            echo "$node sent=$(cat "$counters/rx_bytes") received=$(cat "$counters/tx_bytes")"
        done ;;
    exec) load; check_node "${1:-}"; in_node "$@" ;;
    *) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
